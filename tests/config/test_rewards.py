"""Tests of the checks of reward keys."""

from dataclasses import replace

import pytest

from fastrlhf.config import DRPOConfig, PPOConfig, RTOConfig


def test_only_one_rule_for_a_missing_eos_may_be_given():
    with pytest.raises(ValueError, match=r"^missing_eos_penalty: must be null when missing_eos_score is given"):
        DRPOConfig(missing_eos_penalty=1.0)
    assert DRPOConfig(missing_eos_penalty=1.0, missing_eos_score=None).missing_eos_penalty == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("missing_eos_score", -1.0), ("missing_eos_penalty", 1.0), *(("reward_shaping", s) for s in ("eos", "rs"))],
)
def test_a_truncated_response_has_no_end_at_which_to_pay_rewards(field, value):
    plain = RTOConfig(dpo_model_path="dpo", **{field: value})
    with pytest.raises(ValueError, match=rf"^{field}: must be .* when truncation is bootstrap"):
        replace(plain, truncation="bootstrap")
    replace(plain, truncation="bootstrap", **{field: getattr(RTOConfig(), field)})


def test_a_dpo_reference_without_a_dpo_model_is_refused():
    with pytest.raises(ValueError, match=r"^dpo_ref_model_path: must be empty when there is no dpo_model_path"):
        RTOConfig(dpo_ref_model_path="sft")


@pytest.mark.parametrize(
    ("placement", "estimator", "reason"),
    [
        ("reward", "k2", "k1 or exact in the reward: the mean of k2 is not the KL"),
        ("reward", "k3", r"k1 or exact in the reward: .* minus that of KL\(reference \|\| policy\)"),
        ("loss", "k1", "k2, k3 or exact in the loss: the expected gradient of k1 is 0"),
    ],
)
def test_an_estimator_that_is_wrong_for_its_placement_is_refused(placement, estimator, reason):
    with pytest.raises(ValueError, match=rf"^kl_estimator: must be {reason}.*; got '{estimator}'"):
        PPOConfig(kl_placement=placement, kl_estimator=estimator)


def test_exact_kl_in_the_loss_refuses_an_offloaded_reference():
    with pytest.raises(
        ValueError, match=r"^ref_reward_offload: must be false with kl_placement loss and kl_estimator exact"
    ):
        PPOConfig(kl_placement="loss", kl_estimator="exact", ref_reward_offload=True)
    PPOConfig(kl_estimator="exact", ref_reward_offload=True)


def test_reward_weights_are_given_for_all_functions_or_none():
    functions = ("mine.py:right", "mine.py:form")
    assert PPOConfig(reward_functions=functions, reward_weights=(1.0, -0.5)).reward_weights == (1.0, -0.5)
    with pytest.raises(ValueError, match=r"^reward_weights: must be one per reward function, 2 here; got \(1.0,\)"):
        PPOConfig(reward_functions=functions, reward_weights=(1.0,))
    with pytest.raises(ValueError, match=r"^reward_weights: must be one per reward function, 0 here"):
        PPOConfig(reward_weights=(1.0,))
