"""Sums over the sequences (segments) of a pack, which `cu_seqlens` delimits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._triton import jit, tl


def segment_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Returns for each row the index of the segment that contains the row, [T] int64.

    cu_seqlens [0, 2, 2, 3]  ->  [0, 0, 2]
    """
    row = torch.arange(num_rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.contiguous(), row, right=True) - 1


def segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [T] float32 rows over each segment -> [N], always in the order of the rows; an empty segment gives 0."""
    # unsafe=True skips the check of the offsets, which would wait for the device
    return torch.segment_reduce(rows, "sum", offsets=cu_seqlens.long(), axis=0, unsafe=True)


@jit
def segment_bounds(cu_seqlens, segment, num_rows):
    """Returns (first row, row after the last) of a segment, int64, clamped to `num_rows`: values of cu_seqlens on a GPU
    have not been checked."""
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    return start, tl.minimum(tl.load(cu_seqlens + segment + 1).to(tl.int64), num_rows)
