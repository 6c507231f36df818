"""The update with `update: pair`: losses on pairs of rollouts that start in the same state.

With D = log(policy / base)(y) - log(policy / base)(y'), sums over the sampled tokens, and returns r, r' (the sums of
all rewards of an episode, including the KL):

    rebel  (D - eta (r - r'))^2                  base: the sampler     Gao et al. 2024, arXiv 2404.16767
    dpo    -log sigmoid(beta D), y the better    base: the reference   Guo et al. 2024, arXiv 2402.04792
    ipo    (D - (sigmoid(r - r') - 1/2) / tau)^2 base: the reference   Calandriello et al. 2024, arXiv 2403.08635

If rebel's loss is 0 for all pairs, the policy is proportional to sampler * exp(eta r), a step of natural policy
gradient. From reset states both responses continue the same text, and rebel is REFUEL (Gao et al. 2024, arXiv
2410.04612). REFUEL resets to the end of a turn and sums D over the next turn; here the `reset_*` keys say where a pair
starts, and D is summed to the end of the response. rebel and REFUEL are the losses of their authors' released code. The
texts of the four papers were not available, so there are no equation numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.algorithms.experience import Pack
from fastrlhf.algorithms.open_update import OpenUpdate
from fastrlhf.algorithms.update import mini_batches, remaining
from fastrlhf.config import PPOConfig
from fastrlhf.models.forward import scored_states, state_logprobs
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import Experience, Rollout
from fastrlhf_kernels import LossOutput, Sum, pair_loss


def update_pairs(
    config: PPOConfig,
    policy: PreTrainedModel,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    experience: Experience,
    packs: Sequence[Sequence[Pack]],
    seed: tuple[int, int],
    opened: OpenUpdate | None = None,
) -> dict[str, float]:
    """Makes `num_ppo_epochs` passes over the pairs of the batch, in the packs of the experience. `opened` keeps the
    progress, as in `update`.

    Metrics: loss/policy_avg; pair/accuracy, the share of pairs with D > 0 for the better response; pair/margin and
    pair/return_difference, the means of D and of r - r' of the better response.
    """
    rewards = reduce(torch.add, experience.rewards.values())
    opened = opened or OpenUpdate()
    totals, steps = opened.totals["policy"], opened.steps
    num_pairs = num_mini_batch_pairs(config)
    for _, mini in remaining(mini_batches(config, rollouts, packs, seed, policy.device), opened):
        for item in mini:
            batch, index = item.batch, item.index
            states = scored_states(policy, batch)
            logprob = state_logprobs(
                policy, states, batch.targets, temperature=item.temperature, kept=item.kept
            ).logprob
            base = experience.sampler_logprob if config.pair_loss == "rebel" else experience.reference_logprob
            loss, metrics = loss_of_pairs(
                config, logprob, base[index], rewards[index], experience.trained[index], batch.cu_rows, num_pairs
            )
            loss.backward()
            totals.add(metrics)
        steps.append(optimizer.step())
    means = totals.means("pairs")
    return {
        "learning_rate": steps[-1]["learning_rate"],
        "grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
        "loss/policy_avg": means["loss"],
        "pair/accuracy": means["accuracy"],
        "pair/margin": means["margin"],
        "pair/return_difference": means["return_difference"],
    }


def loss_of_pairs(
    config: PPOConfig,
    logprob: Tensor,
    base_logprob: Tensor,
    reward: Tensor,
    mask: Tensor,
    cu_rows: Tensor,
    num_pairs: int,
) -> LossOutput:
    """Computes the loss of the episodes of a pack, group after group, divided by `num_pairs`.

    logprob, base_logprob, reward [R] float32, mask [R] bool, cu_rows (N+1,) int32. The gradient flows to `logprob`.
    """
    lengths = cu_rows.diff().long()
    returns = torch.segment_reduce(reward, "sum", lengths=lengths, unsafe=True)
    better, worse = select_pairs(returns, config.num_generations, config.pair_select)
    rows, cu_seqlens = rows_of(cu_rows, torch.stack([better, worse], 1).flatten())
    difference = returns[better] - returns[worse]
    margin = _margin(logprob.detach() - base_logprob, mask, rows, cu_seqlens)
    settings: dict[str, Any]
    match config.pair_loss:
        case "rebel":
            settings = {"kind": "ipo", "target": config.pair_eta * difference}
        case "ipo":
            settings = {"kind": "ipo", "target": (difference.sigmoid() - 0.5) / config.pair_beta}
        case _:  # with equal returns no response is better
            settings = {"kind": "dpo", "beta": config.pair_beta, "weight": (difference > 0).float()}
    loss, metrics = pair_loss(
        logprob[rows], base_logprob[rows], cu_seqlens, mask[rows], num_pairs=num_pairs, **settings
    )
    found = {"margin": Sum(margin.sum()), "return_difference": Sum(difference.sum())}
    return LossOutput(loss, {name: metrics[name] for name in ("loss", "pairs", "accuracy")} | found)


def select_pairs(returns: Tensor, group_size: int, select: str) -> tuple[Tensor, Tensor]:
    """Returns the (better, worse) episodes of the pairs, [B] int64 each, from the returns [N] of groups of
    `group_size`. If both returns are equal, the earlier episode counts as the better one."""
    groups = returns.view(-1, group_size)
    first = torch.arange(len(groups), device=returns.device)[:, None] * group_size
    if select == "best_worst":
        best, *_, worst = (first + groups.sort(dim=1, descending=True, stable=True).indices).unbind(1)
        return best, worst
    pairs = (first + torch.arange(group_size, device=returns.device)).view(-1, 2)
    swapped = returns[pairs[:, 0]] < returns[pairs[:, 1]]
    pairs = torch.where(swapped[:, None], pairs.flip(1), pairs)
    return pairs[:, 0], pairs[:, 1]


def rows_of(cu_rows: Tensor, episodes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of the given episodes, one after the other, and the start of each episode in them: [R'] int64,
    (len + 1,) int32.

    cu_rows [0, 2, 5], episodes [1, 0]  ->  rows [2, 3, 4, 0, 1], starts [0, 3, 5]
    """
    lengths = cu_rows.diff().long()[episodes]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    shift = cu_rows[:-1].long()[episodes] - starts[:-1]
    rows = torch.arange(int(starts[-1]), device=cu_rows.device)
    return rows + shift.repeat_interleave(lengths, output_size=len(rows)), starts.int()


def num_mini_batch_pairs(config: PPOConfig) -> int:
    """Returns the number of pairs of an optimiser step, over all processes."""
    per_group = 1 if config.pair_select == "best_worst" else config.num_generations // 2
    return config.batch_size // config.num_generations // config.num_mini_batches * per_group


def _margin(log_ratio: Tensor, mask: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns [B], D of each pair, in nats."""
    kept = torch.where(mask, log_ratio, 0.0)[rows]
    sums = torch.segment_reduce(kept, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)
    return sums[::2] - sums[1::2]
