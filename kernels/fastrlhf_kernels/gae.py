"""Generalised advantage estimation on packed segments, without a loop over time.

    delta_t = reward_t + gamma V_next - V_t
    A_t     = delta_t + gamma lam A_next,   returns_t = A_t + V_t

`next` is the next row of the segment that is in the mask; after the last one A_next = 0 and V_next = bootstrap, which
is 0 where the episode ended. A row outside the mask (a tool's output) hands A on unchanged and gives 0; its reward and
value count for nothing.

The recurrence A_t = b_t + a_t A_{t+1} is solved by doubling: after step k a row knows b and a of the 2^k rows from it
on; log2(T) steps of a few passes over [T], no wait for the device. A row never reads past the end of its segment, so a
segment's result has the same bits in any pack, and a NaN stays in its segment.

No gradient. Legend: T rows, N segments. Schulman et al. 2016 (arXiv 1506.02438) eq. 11, 16; the scan: Hillis and Steele
1986.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastrlhf_kernels._checks import check_cu_seqlens, check_impl, check_range, check_rows, check_tensor
from fastrlhf_kernels._segments import segment_of_row


@torch.no_grad()
def gae(
    reward: Tensor,  # [T]
    value: Tensor,  # [T] of the state in which the row's token was chosen
    cu_seqlens: Tensor,  # [N+1] int32 or int64; empty segments allowed
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,  # [T] bool; None for all rows
    bootstrap: Tensor | None = None,  # [N] value after the last row of cut segments, 0 for ended ones; None for all 0
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(advantage, returns), [T] float32 each, detached. Raises ValueError for bad arguments."""
    check_impl(impl)
    check_rows("reward", reward)
    shape, device = tuple(reward.shape), reward.device
    check_tensor("value", value, shape, device)
    check_cu_seqlens(cu_seqlens, len(reward), device)
    check_range("gamma", gamma, 0, 1)
    check_range("lam", lam, 0, 1)
    if mask is not None:
        check_tensor("mask", mask, shape, device, (torch.bool,))
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, (len(cu_seqlens) - 1,), device)
    keep = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    reward, value = reward.float(), value.float()
    if len(reward) == 0:
        return torch.zeros_like(reward), torch.zeros_like(value)

    row = torch.arange(len(reward), device=device)
    segment = segment_of_row(cu_seqlens, len(row))
    end = cu_seqlens.long()[segment + 1]
    # For each row the first row in the mask that comes after it: a reverse running minimum over indices.
    upcoming = row.where(keep, len(row)).flip(0).cummin(0).values.flip(0)
    upcoming = torch.cat([upcoming[1:], upcoming.new_full((1,), len(row))])
    after = torch.zeros_like(value) if bootstrap is None else bootstrap.float()[segment]
    next_value = value[upcoming.clamp(max=len(row) - 1)].where(upcoming < end, after)

    constant = (reward + gamma * next_value - value).where(keep, 0)
    carried = torch.where(keep, gamma * lam, torch.ones_like(value))
    distance = 1
    while distance < len(row):
        inside = row + distance < end
        other = (row + distance).clamp(max=len(row) - 1)
        constant = (constant + carried * constant[other]).where(inside, constant)
        carried = carried * carried[other]
        distance *= 2
    advantage = constant.where(keep, 0)
    return advantage, (advantage + value).where(keep, 0)


def gae_reference(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: backwards through every segment, in the dtype given."""
    advantage, returns = torch.zeros_like(reward), torch.zeros_like(reward)
    bounds = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(bounds)):
        last, next_value = reward.new_zeros(()), reward.new_zeros(()) if bootstrap is None else bootstrap[i]
        for t in reversed(range(start, stop)):
            if mask is None or mask[t]:
                last = advantage[t] = reward[t] + gamma * next_value - value[t] + gamma * lam * last
                returns[t], next_value = last + value[t], value[t]
    return advantage, returns
