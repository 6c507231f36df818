"""Computes the outcome of a response as one number, and whether the response succeeded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrlhf.config import PPOConfig
from fastrlhf.rewards.functions import Earned, RewardFunctions
from fastrlhf.types import Rollout


def outcomes(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    scores: Tensor | None,
    functions: RewardFunctions,
    earned: Earned,
) -> Tensor:
    """Returns [N] float64 on the CPU: score_coef * score + the weighted sum of the rewards of the reward functions.

    `scores` [N] are those of the judge, None if there is none; `earned` is the result of `functions`, whose rewards per
    token are summed. For a response without an EOS, `missing_eos_score` replaces the score and `missing_eos_penalty` is
    subtracted. KL, token rewards of a DPO model, normalisation and clipping are left out, so equal responses to a
    prompt always have equal outcomes.
    """
    outcome = torch.zeros(len(rollouts), dtype=torch.float64)
    missing = torch.tensor([not rollout.ended for rollout in rollouts])
    if scores is not None:
        score = scores.double().cpu()
        if config.missing_eos_score is not None:
            score = torch.where(missing, config.missing_eos_score, score)
        outcome += config.score_coef * score
    if config.missing_eos_penalty is not None:
        outcome -= config.missing_eos_penalty * missing
    if earned:
        outcome += torch.tensor(functions.totals(earned), dtype=torch.float64)
    return outcome


def successes(config: PPOConfig, outcome: Tensor) -> Tensor:
    """Returns [N] bool: whether each outcome is at least `success_threshold` or, if there is no threshold, at least the
    mean of its group. The outcomes [N] are ordered by group. The best outcome of a group always counts as at least the
    mean, whatever the rounding."""
    if config.success_threshold is not None:
        return outcome >= config.success_threshold
    groups = outcome.view(-1, config.num_generations)
    reached = (groups >= groups.mean(1, keepdim=True)) | (groups == groups.amax(1, keepdim=True))
    return reached.flatten()
