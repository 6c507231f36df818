"""Tests of the outcomes of responses against values computed by hand, and of which responses count as successes."""

import pytest
import torch

from fastrlhf.algorithms.outcomes import outcomes, successes
from fastrlhf.config import GRPOConfig
from fastrlhf.rewards.functions import RewardFunctions
from fastrlhf.types import Prefix, Rollout


def rollout(ended: bool) -> Rollout:
    prefix = Prefix(token_ids=[5], num_reset=0, row=0, episode=0)
    return Rollout(prefix=prefix, completion=[3, 4], sampler_logprob=[0.0, 0.0], ended=ended)


def config(**settings) -> GRPOConfig:
    return GRPOConfig(**{"num_generations": 2, "per_device_train_batch_size": 4} | settings)


def test_an_outcome_is_the_score_and_the_weighted_rewards():
    rollouts = [rollout(True), rollout(False), rollout(True)]
    functions = RewardFunctions(functions={"f": len, "g": len}, weights={"f": 2.0})
    earned = {
        "f": [torch.tensor(1.0), None, torch.tensor([0.5, 0.25])],
        "g": [torch.tensor(x) for x in (1.0, 2.0, 3.0)],
    }
    scores = torch.tensor([1.0, 5.0, -1.0])
    cfg = config(score_coef=0.5, missing_eos_score=-4.0, reward_model_path="judge")
    assert outcomes(cfg, rollouts, scores, functions, earned).tolist() == [0.5 + 2 + 1, -2 + 0 + 2, -0.5 + 1.5 + 3]
    cfg = config(missing_eos_penalty=0.25)
    assert outcomes(cfg, rollouts, None, functions, earned).tolist() == [3, 1.75, 4.5]
    assert outcomes(cfg, rollouts, scores, RewardFunctions(), {}).tolist() == [1, 4.75, -1]


def test_a_response_succeeds_at_the_threshold_or_at_the_mean_of_its_group():
    outcome = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    assert successes(config(reset_prob=1.0, reset_source="rollout"), outcome).tolist() == [False, True, True, False]
    settings = {"reset_prob": 1.0, "reset_source": "rollout", "success_threshold": 0.5}
    assert successes(config(**settings), outcome).tolist() == [False, True, True, False]
    assert successes(config(**settings), outcome + 1).tolist() == [True] * 4


@pytest.mark.parametrize("value", [0.1, 1e-17, 1e30])
def test_equal_outcomes_all_succeed_despite_rounding_of_their_mean(value):
    size = 7
    cfg = config(num_generations=size, per_device_train_batch_size=size, reset_prob=1.0, reset_source="rollout")
    assert successes(cfg, torch.full((size,), value, dtype=torch.float64)).all()
