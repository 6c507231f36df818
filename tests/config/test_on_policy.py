"""Tests of the checks of key combinations for the on-policy trainer."""

from dataclasses import asdict, replace

import pytest

from fastrlhf.config import (
    DRPOConfig,
    GRPOConfig,
    PPOConfig,
    RTOConfig,
)


def test_drpo_is_ppo_with_the_settings_of_its_paper():
    paper = {"reset_prob": 1.0, "missing_eos_score": -1.0, "whiten_rewards": True, "adam_epsilon": 1e-5}
    assert asdict(DRPOConfig()) == asdict(PPOConfig()) | paper


def test_rto_is_ppo_with_the_settings_of_its_paper():
    assert asdict(RTOConfig()) == asdict(PPOConfig()) | {"kl_coef": 0.01, "temperature": 1.0}
    assert (RTOConfig().dpo_reward_scale, RTOConfig().score_coef, RTOConfig().dpo_reward_clip) == (0.05, 1.0, 0.0)


def test_grpo_is_ppo_with_the_defaults_of_trl():
    """Compares with the defaults of TRL 1.16's GRPOConfig: num_generations 8, beta 0, num_iterations 1,
    max_completion_length 256, temperature 1."""
    trl = {"learning_rate": 1e-6, "num_train_epochs": 3.0, "response_length": 256, "temperature": 1.0}
    trl |= {
        "loss_type": "dapo",
        "kl_coef": 0.0,
        "num_ppo_epochs": 1,
        "advantage_estimator": "grpo",
        "num_generations": 8,
    }
    assert {name: getattr(GRPOConfig(), name) for name in trl} == trl
    assert asdict(GRPOConfig()) == asdict(PPOConfig()) | trl


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_group_advantages_need_a_group_whole_episodes_and_no_critic(estimator):
    config = PPOConfig(advantage_estimator=estimator, num_generations=2)
    refused = (("num_generations", 1), ("reset_group", "response"), ("gamma", 0.9), ("compat", "reference"))
    for field, value in refused:
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with advantage_estimator {estimator}"):
            replace(config, **{field: value})


def test_mini_batches_hold_whole_groups():
    with pytest.raises(ValueError, match=r"^num_mini_batches: must be a divisor of the batch of 8 groups of episodes"):
        PPOConfig(num_generations=8, num_mini_batches=16)


def test_an_exact_kl_in_the_reward_is_not_rescaled_by_grpo():
    with pytest.raises(ValueError, match=r"^advantage_estimator: must be gae, rloo, opo or prime with kl_estimator"):
        PPOConfig(kl_estimator="exact", advantage_estimator="grpo", num_generations=2)
    PPOConfig(kl_placement="loss", kl_estimator="exact", advantage_estimator="grpo", num_generations=2)


def test_a_controller_needs_a_coefficient_to_multiply_and_a_horizon_of_a_batch():
    with pytest.raises(ValueError, match=r"^kl_coef: must be above 0 when kl_target is given"):
        PPOConfig(kl_target=6.0, kl_coef=0.0)
    with pytest.raises(ValueError, match=r"^kl_horizon: must be at least the batch of 64 episodes"):
        PPOConfig(kl_target=6.0, kl_horizon=63)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("kl_placement", {"kl_placement": "loss", "kl_estimator": "k2"}),
        ("loss_aggregation", {"loss_aggregation": "sequence"}),
        ("loss_type", {"loss_type": "gspo"}),
        ("mask_truncated_completions", {"mask_truncated_completions": True}),
        ("truncation", {"truncation": "bootstrap", "missing_eos_score": None}),
    ],
)
def test_compat_reference_does_not_change_the_loss(field, settings):
    with pytest.raises(ValueError, match=rf"^{field}: must be .* with compat reference"):
        DRPOConfig(compat="reference", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "grpo", "loss_aggregation": "constant"}, r"^loss_aggregation: .* with loss_type grpo"),
        ({"loss_type": "cispo", "cliprange": 0.3}, r"^cliprange: .* with loss_type cispo"),
        ({"loss_type": "cispo", "dual_clip": 3.0}, r"^dual_clip: .* with loss_type cispo"),
        ({"scale_rewards": "none"}, r"^scale_rewards: .* when advantage_estimator is gae, not grpo"),
    ],
)
def test_unread_keys_of_group_losses_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


@pytest.mark.parametrize(
    ("name", "average"),
    [("ppo", "token"), ("grpo", "sequence"), ("gspo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")],
)
def test_each_loss_averages_as_its_paper_says(name, average):
    assert PPOConfig(loss_type=name).aggregation == average
