"""Generalised advantage estimation on packed segments, without a loop over time.

    delta_t = reward_t + gamma V_next - V_t
    A_t     = delta_t + gamma lam A_next,   returns_t = A_t + V_t

`next` is the next row of the segment that is in the mask. After the last one A_next = 0 and V_next = bootstrap, which
is 0 if the episode ended. A row outside the mask (for example the output of a tool) is skipped: its reward and value
are ignored and its results are 0.

The recurrence A_t = b_t + a_t A_next is a scan over pairs (a, b). On a GPU each program of one kernel walks backwards
through a segment in blocks and carries A and V along: one pass, 17 T bytes in float32. In torch the recurrence is
solved by doubling: after step k each row holds (a, b) composed over the 2^k rows that start with it, so log2(T) steps
of a few passes suffice. Neither path waits for the device. A row never reads past the end of its segment, so a
segment's result has the same bits in any pack, and a NaN stays in its segment.

There is no gradient. Legend: T rows, N segments. Schulman et al. 2016 (arXiv 1506.02438) eq. 11, 16; scan: Hillis and
Steele 1986.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastrlhf_kernels import _rows
from fastrlhf_kernels._checks import check_cu_seqlens, check_range, check_rows, check_tensor
from fastrlhf_kernels._rows import contiguous, load_float32
from fastrlhf_kernels._segments import segment_bounds, segment_of_row
from fastrlhf_kernels._triton import OPTIONS, jit, tl, use_triton


@torch.no_grad()
def gae(
    reward: Tensor,  # [T]
    value: Tensor,  # [T] value of the state in which the row's token was chosen
    cu_seqlens: Tensor,  # [N+1] int32 or int64; empty segments allowed
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,  # [T] bool; None for all rows
    bootstrap: Tensor | None = None,  # [N] value after the last row of a truncated segment, 0 if it ended; None: all 0
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns (advantage, returns), [T] float32 each, detached. Raises ValueError for bad arguments."""
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
    return _gae(reward, value, cu_seqlens, mask, bootstrap, float(gamma), float(lam), use_triton(impl, device))


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
    """Computes GAE by its definition: a loop backwards through every segment, in the dtype of the inputs."""
    advantage, returns = torch.zeros_like(reward), torch.zeros_like(reward)
    bounds = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(bounds)):
        last, next_value = reward.new_zeros(()), reward.new_zeros(()) if bootstrap is None else bootstrap[i]
        for t in reversed(range(start, stop)):
            if mask is None or mask[t]:
                last = advantage[t] = reward[t] + gamma * next_value - value[t] + gamma * lam * last
                returns[t], next_value = last + value[t], value[t]
    return advantage, returns


@torch.library.custom_op("fastrlhf::gae", mutates_args=())
def _gae(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """The operator behind `gae`; returns (advantage, returns), [T] float32 each."""
    if not triton:
        keep = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
        return _by_doubling(reward.float(), value.float(), cu_seqlens, keep, bootstrap, gamma, lam)
    advantage, returns = (reward.new_empty(reward.shape, dtype=torch.float32) for _ in range(2))
    tensors = contiguous(reward, value, cu_seqlens, mask, bootstrap)
    with torch.cuda.device_of(reward):
        options = (len(reward), gamma, gamma * lam, _rows.BLOCK)
        gae_kernel[(len(cu_seqlens) - 1,)](*tensors, advantage, returns, *options, **OPTIONS)
    return advantage, returns


@_gae.register_fake
def _(reward, *_):
    return tuple(reward.new_empty(reward.shape, dtype=torch.float32) for _ in range(2))


def _by_doubling(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Computes GAE in torch in log2(T) steps. Each step doubles the number of rows that the result of a row covers."""
    if len(reward) == 0:
        return torch.zeros_like(reward), torch.zeros_like(value)
    row = torch.arange(len(reward), device=reward.device)
    segment = segment_of_row(cu_seqlens, len(row))
    end = cu_seqlens.long()[segment + 1]
    # The next row in the mask after each row, found as a running minimum of indices from the end.
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


@jit
def _follow(a, b, next_a, next_b):
    """Composes two affine maps: first x -> a x + b, then x -> next_a x + next_b."""
    return a * next_a, next_a * b + next_b


@jit
def gae_kernel(
    reward,
    value,
    cu_seqlens,
    mask,  # or None
    bootstrap,  # or None
    advantage,
    returns,
    num_rows,
    gamma,
    decay,  # gamma lam
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start, stop = segment_bounds(cu_seqlens, segment, num_rows)
    last = 0.0
    last_value = 0.0
    if bootstrap is not None:
        last_value = tl.load(bootstrap + segment).to(tl.float32)
    backwards = tl.arange(0, BLOCK)
    for done in range(0, stop - start, BLOCK):
        # Loaded backwards and scanned forwards: Triton's reverse scan has given wrong numbers (Triton issue 4362).
        rows = stop - 1 - done - backwards
        inside = rows >= start
        keep = inside
        kept_next = inside & (rows + 1 < stop)
        if mask is not None:
            keep = tl.load(mask + rows, mask=inside, other=0).to(tl.int1)
            kept_next = tl.load(mask + rows + 1, mask=kept_next, other=0).to(tl.int1)
        row_value = load_float32(value, rows, keep)
        # V_next of a row is the value of the next row or, if the next row is outside the mask, V_next of the next row.
        held, next_value = tl.associative_scan(
            (tl.where(kept_next, 0.0, 1.0), load_float32(value, rows + 1, kept_next)), 0, _follow
        )
        next_value += held * last_value
        delta = tl.where(keep, load_float32(reward, rows, keep) + gamma * next_value - row_value, 0.0)
        carried, total = tl.associative_scan((tl.where(keep, decay, 1.0), delta), 0, _follow)
        total += carried * last
        tl.store(advantage + rows, tl.where(keep, total, 0.0), mask=inside)
        tl.store(returns + rows, tl.where(keep, total + row_value, 0.0), mask=inside)
        last = tl.sum(tl.where(backwards == BLOCK - 1, total, 0.0), 0)
        last_value = tl.sum(tl.where(backwards == BLOCK - 1, next_value, 0.0), 0)
