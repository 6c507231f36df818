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
    config = PPOConfig(advantage_estimator=estimator, reset_group_size=2)
    refused = (("reset_group_size", 1), ("reset_group", "response"), ("gamma", 0.9), ("compat", "reference"))
    for field, value in refused:
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with advantage_estimator {estimator}"):
            replace(config, **{field: value})


def test_mini_batches_hold_whole_groups():
    with pytest.raises(ValueError, match=r"^num_mini_batches: must be a divisor of the batch of 8 groups of episodes"):
        PPOConfig(reset_group_size=8, num_mini_batches=16)


def test_vllm_reads_a_model_from_a_folder_and_has_no_temperature_below_its_own_least():
    config = PPOConfig(engine="vllm")
    for field, value in (("model_config", '{"model_type": "llama"}'), ("temperature", 0.009)):
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with engine vllm"):
            replace(config, **{field: value})
        replace(config, **{field: value, "engine": "transformers"})
