"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 11): groups with equal outcomes are replaced.

If all responses of a group have equal outcomes, their advantages are 0 with group estimators, so the group does not
change the policy. With `dynamic_sampling_factor` above 1 such a group is dropped, and a group of another prompt is
sampled in its place. Rounds of sampling continue until the outcomes vary within every group of the batch, or until the
update has sampled dynamic_sampling_factor times the number of groups of a batch. A round samples only the missing
groups. If this limit is reached, dropped groups fill the batch in the order of sampling; they count in averages over
the batch, as without dynamic sampling.

The outcome of a response is its score and its rewards from functions (outcomes.py), without KL and overlong penalty.
The prompts and the random draws of a refill depend on (seed, update, round) only, so a resumed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from fastrlhf.algorithms.judging import JudgedRollouts, joined
from fastrlhf.config import PPOConfig
from fastrlhf.runtime.mixing import Shares
from fastrlhf.types import TokenizedExample

REFILLED = 1 << 45
"""Refills number their episodes from here, so that their random draws never coincide with those of other episodes."""
REFILL_STREAM = 7
"""Random stream that chooses the prompts of refills."""
DROPPED_TOKENS = "dynamic_sampling/dropped_tokens"
"""Metric: the number of sampled tokens that are not trained on."""


def refilled(
    config: PPOConfig,
    prompts: Sequence[TokenizedExample],
    drawn: Sequence[int],
    step: int,
    sample: Callable[[Sequence[TokenizedExample], int], JudgedRollouts],
    shares: Shares = (),
) -> tuple[JudgedRollouts, dict[str, float]]:
    """Samples groups until the outcomes vary within every group of the batch or the limit is reached; returns the batch
    and metrics.

    `drawn` are the indices of the prompts of update number `step`, counted from 0. `sample` takes prompts and the
    number of their first group, and returns their judged rollouts. `shares`: the sizes and weights of the datasets of
    the prompts, by which refills are drawn too. Metrics: dynamic_sampling/sampled_groups,
    /dropped_groups (sampled and not trained on), /unfilled_groups (trained on although their outcomes are equal) and
    /dropped_tokens.
    """
    size, needed = config.num_generations, len(drawn)
    budget = int(config.dynamic_sampling_factor * needed)
    parts = [sample([prompts[i] for i in drawn], step * needed)]
    used = list(drawn)
    first = -(-REFILLED // size) + step * budget
    while (missing := needed - len(with_spread(joined(parts).outcome, size))) and len(used) < budget:
        count = min(missing, budget - len(used))
        key = (config.seed, step, REFILL_STREAM, len(parts))
        indices = _other_prompts(len(prompts), used, count, key, shares)
        parts.append(sample([prompts[i] for i in indices], first + len(used)))
        used += indices
    everything = joined(parts)
    varied = with_spread(everything.outcome, size)[:needed]
    rest = [group for group in range(len(used)) if group not in set(varied)]
    kept = sorted([*varied, *rest[: needed - len(varied)]])
    batch, dropped = everything.groups(kept, size), sorted(set(range(len(used))) - set(kept))
    return batch, {
        "dynamic_sampling/sampled_groups": float(len(used)),
        "dynamic_sampling/dropped_groups": float(len(dropped)),
        "dynamic_sampling/unfilled_groups": float(needed - len(varied)),
        DROPPED_TOKENS: float(sum(len(rollout.completion) for rollout in everything.groups(dropped, size).rollouts)),
    }


def with_spread(outcome: Tensor, size: int) -> list[int]:
    """Returns the numbers of the groups of `size` responses whose outcomes are not all equal; `outcome` is [N]."""
    groups = outcome.view(-1, size)
    return (groups.amax(1) > groups.amin(1)).nonzero()[:, 0].tolist()


def _other_prompts(num: int, used: Sequence[int], count: int, key: Sequence[int], shares: Shares = ()) -> list[int]:
    """Returns `count` indices of prompts in random order: first unused prompts, then, if these are too few, all
    prompts. With `shares` each next prompt is drawn in proportion to the weight of its dataset."""
    draw = np.random.default_rng(list(key))
    if shares:
        sizes, weights = zip(*shares, strict=True)
        # The order of exponential times whose rates are the weights is that of weighted draws without replacement.
        order = np.argsort(draw.exponential(size=num) / np.repeat(weights, sizes)).tolist()
    else:
        order = draw.permutation(num).tolist()
    before = set(used)
    fresh = [i for i in order if i not in before]
    return (fresh + order * math.ceil(count / num))[:count]
