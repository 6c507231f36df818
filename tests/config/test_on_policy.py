"""What goes together in the on-policy trainer."""

from dataclasses import asdict, replace

import pytest

from fastrlhf.config import (
    DRPOConfig,
    PPOConfig,
    RTOConfig,
)


def test_only_one_rule_for_a_missing_eos():
    with pytest.raises(ValueError, match=r"^missing_eos_penalty: must be null where missing_eos_score is given"):
        DRPOConfig(missing_eos_penalty=1.0)
    assert DRPOConfig(missing_eos_penalty=1.0, missing_eos_score=None).missing_eos_penalty == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("missing_eos_score", -1.0), ("missing_eos_penalty", 1.0), *(("reward_shaping", s) for s in ("eos", "rs"))],
)
def test_a_response_that_goes_on_has_no_end_to_pay_at(field, value):
    plain = RTOConfig(dpo_model_path="dpo", **{field: value})
    with pytest.raises(ValueError, match=rf"^{field}: must be .* where truncation is bootstrap"):
        replace(plain, truncation="bootstrap")
    replace(plain, truncation="bootstrap", **{field: getattr(RTOConfig(), field)})


def test_drpo_is_ppo_with_the_settings_of_its_paper():
    paper = {"reset_prob": 1.0, "missing_eos_score": -1.0, "whiten_rewards": True, "adam_epsilon": 1e-5}
    assert asdict(DRPOConfig()) == asdict(PPOConfig()) | paper


def test_rto_is_ppo_with_the_settings_of_its_paper():
    assert asdict(RTOConfig()) == asdict(PPOConfig()) | {"kl_coef": 0.01, "temperature": 1.0}
    assert (RTOConfig().dpo_reward_scale, RTOConfig().score_coef, RTOConfig().dpo_reward_clip) == (0.05, 1.0, 0.0)


def test_a_reference_of_no_dpo_model_is_refused():
    with pytest.raises(ValueError, match=r"^dpo_ref_model_path: must be empty where there is no dpo_model_path"):
        RTOConfig(dpo_ref_model_path="sft")


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_an_advantage_of_the_group_wants_a_group_whole_episodes_and_no_critic(estimator):
    config = PPOConfig(advantage_estimator=estimator, num_generations=2)
    refused = (("num_generations", 1), ("reset_group", "response"), ("gamma", 0.9), ("compat", "reference"))
    for field, value in refused:
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with advantage_estimator {estimator}"):
            replace(config, **{field: value})


def test_mini_batches_hold_whole_groups():
    with pytest.raises(ValueError, match=r"^num_mini_batches: must be a divisor of the batch of 8 groups of episodes"):
        PPOConfig(num_generations=8, num_mini_batches=16)


def test_vllm_reads_a_model_from_a_folder_and_has_no_temperature_below_its_own_least():
    config = PPOConfig(engine="vllm")
    for field, value in (("model_config", '{"model_type": "llama"}'), ("temperature", 0.009)):
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with engine vllm"):
            replace(config, **{field: value})
        replace(config, **{field: value, "engine": "transformers"})


@pytest.mark.parametrize(
    ("placement", "estimator", "reason"),
    [
        ("reward", "k2", "k1 or exact in the reward: the mean of k2 is not the KL"),
        ("reward", "k3", r"k1 or exact in the reward: .* minus that of KL\(reference \|\| policy\)"),
        ("loss", "k1", "k2, k3 or exact in the loss: the gradient of k1 is 0 in the mean"),
    ],
)
def test_an_estimator_that_is_wrong_where_it_stands_is_refused_with_the_reason(placement, estimator, reason):
    with pytest.raises(ValueError, match=rf"^kl_estimator: must be {reason}.*; got '{estimator}'"):
        PPOConfig(kl_placement=placement, kl_estimator=estimator)


def test_an_exact_kl_in_the_loss_reads_the_reference_while_it_would_wait():
    with pytest.raises(ValueError, match=r"^ref_reward_offload: must be false with kl_estimator exact in the loss"):
        PPOConfig(kl_placement="loss", kl_estimator="exact", ref_reward_offload=True)
    PPOConfig(kl_estimator="exact", ref_reward_offload=True)


def test_an_exact_kl_in_the_reward_is_not_rescaled_by_grpo():
    with pytest.raises(ValueError, match=r"^advantage_estimator: must be gae or rloo with kl_estimator exact"):
        PPOConfig(kl_estimator="exact", advantage_estimator="grpo", num_generations=2)
    PPOConfig(kl_placement="loss", kl_estimator="exact", advantage_estimator="grpo", num_generations=2)


def test_a_controller_needs_a_coefficient_to_multiply_and_a_horizon_of_a_batch():
    with pytest.raises(ValueError, match=r"^kl_coef: must be above 0 where kl_target is given"):
        PPOConfig(kl_target=6.0, kl_coef=0.0)
    with pytest.raises(ValueError, match=r"^kl_horizon: must be at least the batch of 64 episodes"):
        PPOConfig(kl_target=6.0, kl_horizon=63)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("dual_clip", 1.0, "above 1"),
        ("sampler_is_cap", 0.9, "at least 1"),
        ("cliprange_high", 0.0, "above 0"),
        ("target_kl", 0.0, "above 0"),
        ("entropy_coef", -0.1, "at least 0"),
    ],
)
def test_the_bounds_of_the_optional_terms(field, value, rule):
    with pytest.raises(ValueError, match=rf"^{field}: must be {rule}"):
        PPOConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("kl_placement", {"kl_placement": "loss", "kl_estimator": "k2"}),
        ("loss_aggregation", {"loss_aggregation": "sequence"}),
        ("truncation", {"truncation": "bootstrap", "missing_eos_score": None}),
    ],
)
def test_the_semantics_of_the_authors_leave_the_loss_as_it_is(field, settings):
    with pytest.raises(ValueError, match=rf"^{field}: must be .* under compat reference"):
        DRPOConfig(compat="reference", **settings)


def test_a_warmup_of_the_critic_needs_one():
    with pytest.raises(ValueError, match=r"^value_warmup_steps: must be 0 with advantage_estimator rloo"):
        PPOConfig(advantage_estimator="rloo", num_generations=2, value_warmup_steps=1)
