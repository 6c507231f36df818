"""Calls the judge and the reward functions of a run; every response is judged once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrlhf.algorithms.outcomes import outcomes, successes
from fastrlhf.algorithms.roles import Roles
from fastrlhf.config import PPOConfig
from fastrlhf.evaluation.judges import checked_scores
from fastrlhf.rewards.functions import Earned
from fastrlhf.types import Rollout


@dataclass(kw_only=True)
class JudgedRollouts:
    """Rollouts, group after group, with everything that judges and reward functions gave them."""

    rollouts: list[Rollout]
    scores: Tensor | None
    """[N] float32; None without a judge"""
    earned: Earned
    outcome: Tensor
    """[N] float64 on the CPU (outcomes.py)"""
    succeeded: Tensor
    """[N] bool on the CPU"""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that reward functions logged for samples; a value per rollout"""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that reward functions logged"""

    def groups(self, chosen: Sequence[int], size: int) -> JudgedRollouts:
        """Returns the groups with the given numbers, in this order."""
        index = [group * size + i for group in chosen for i in range(size)]

        def pick(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in index]

        return JudgedRollouts(
            rollouts=pick(self.rollouts),
            scores=None if self.scores is None else self.scores[index],
            earned={name: pick(values) for name, values in self.earned.items()},
            outcome=self.outcome[index],
            succeeded=self.succeeded[index],
            extra={name: pick(values) for name, values in self.extra.items() if len(values) == len(self.rollouts)},
            metrics=self.metrics,
        )


def judged_rollouts(config: PPOConfig, roles: Roles, rollouts: Sequence[Rollout]) -> JudgedRollouts:
    """Scores rollouts by the judge and the reward functions of the run, each called once."""
    scores = checked_scores(roles.score(rollouts), rollouts, roles.policy.device) if roles.score else None
    functions = roles.rewards.functions
    earned = functions(rollouts)
    outcome = outcomes(config, rollouts, scores, functions, earned)
    return JudgedRollouts(
        rollouts=list(rollouts),
        scores=scores,
        earned=earned,
        outcome=outcome,
        succeeded=successes(config, outcome),
        extra=functions.extra,
        metrics=functions.metrics,
    )


def judged_once(
    known: JudgedRollouts | None,
    rollouts: Sequence[Rollout],
    size: int,
    judge: Callable[[Sequence[Rollout]], JudgedRollouts],
) -> JudgedRollouts:
    """Returns the judged rollouts of an update. `judge` is called only with the groups of `size` rollouts that `known`
    does not hold in the same place; the results of all other groups are taken from `known`. None: no group is known.
    """
    if known is None:
        return judge(rollouts)
    num = len(rollouts) // size
    pairs = zip(known.rollouts, rollouts, strict=True)
    changed = sorted({i // size for i, (before, now) in enumerate(pairs) if before is not now})
    if not changed:
        return known
    again = judge([rollout for group in changed for rollout in rollouts[group * size : (group + 1) * size]])
    place = {group: num + i for i, group in enumerate(changed)}
    return joined([known, again]).groups([place.get(group, group) for group in range(num)], size)


def joined(parts: Sequence[JudgedRollouts]) -> JudgedRollouts:
    """Joins several batches into one; a metric becomes its mean over the batches that logged it."""
    logged = list(dict.fromkeys(name for part in parts for name in part.metrics))
    means = {name: float(np.mean([part.metrics[name] for part in parts if name in part.metrics])) for name in logged}
    columns = [name for name in parts[0].extra if all(name in part.extra for part in parts)]
    scores = [part.scores for part in parts if part.scores is not None]
    return JudgedRollouts(
        rollouts=[rollout for part in parts for rollout in part.rollouts],
        scores=torch.cat(scores) if scores else None,
        earned={name: [value for part in parts for value in part.earned[name]] for name in parts[0].earned},
        outcome=torch.cat([part.outcome for part in parts]),
        succeeded=torch.cat([part.succeeded for part in parts]),
        extra={name: [value for part in parts for value in part.extra[name]] for name in columns},
        metrics=means,
    )
