"""Computes attention over a pack by FlexAttention (Dong et al. 2024, arXiv 2412.05496).

The keys of a segment are consecutive rows, and its queries see them causally, so each query sees one interval of key
rows. Two integers per token therefore describe the mask, including branches and windows, and the block mask is computed
from them without a mask of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastrlhf.types import AttentionPlan

BLOCK = 128


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Computes attention: q [T, H, d], k and v [K, H_kv, d] -> [T, H, d]. On a CPU torch has only reference code, which
    computes all scores and has no backward pass; it serves to test the masks."""
    run = _compiled() if q.is_cuda else flex_attention
    output = run(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=None if softcap is None else _capped(softcap, q.device),
        block_mask=block_mask(plan.query_lengths, plan.key_lengths, window, q.device),
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


@lru_cache(maxsize=8)  # all layers of a forward pass and of its recomputation share one or two masks
def block_mask(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], window: int | None, device: torch.device
) -> BlockMask:
    """Returns the block mask of the queries of a pack against its gathered keys."""
    first, last = (rows.to(device, non_blocking=True) for rows in visible(query_lengths, key_lengths, window))
    num_queries, num_keys = sum(query_lengths), sum(key_lengths)
    top = torch.arange(0, num_queries, BLOCK, device=device)
    # Both ends of the interval increase from row to row, so a block begins at the start of its first row's interval and
    # ends at the end of its last row's interval.
    low, high = first[top] // BLOCK, last[(top + BLOCK - 1).clamp(max=num_queries - 1)] // BLOCK
    num_blocks = -(-num_keys // BLOCK)
    blocks = (low[:, None] + torch.arange(num_blocks, device=device)).clamp(max=num_blocks - 1)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= last[query])

    return BlockMask.from_kv_blocks(
        (high - low + 1).int()[None, None],
        blocks.int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(num_queries, num_keys),
    )


def visible(query_lengths: Sequence[int], key_lengths: Sequence[int], window: int | None) -> tuple[Tensor, Tensor]:
    """Returns ([T], [T]) int64: the first and the last key row that each query sees. The mask is causal, aligned at the
    bottom right, with at most `window` keys."""
    queries, keys = torch.tensor(query_lengths), torch.tensor(key_lengths)
    ends, key_ends = queries.cumsum(0), keys.cumsum(0)
    last = torch.arange(int(ends[-1])) + (key_ends - ends).repeat_interleave(queries)
    first = (key_ends - keys).repeat_interleave(queries)
    return first if window is None else torch.maximum(first, last - window + 1), last


@cache
def _capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    cap = torch.tensor(softcap, device=device)  # a number would cause recompilations

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)
