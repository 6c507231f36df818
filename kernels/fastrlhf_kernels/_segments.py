"""Sums over the sequences of a pack, as `cu_seqlens` delimits them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._triton import jit, tl


def segment_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """[T] int64: the segment that each row lies in.

    cu_seqlens [0, 2, 2, 3]  ->  [0, 0, 2]
    """
    row = torch.arange(num_rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.contiguous(), row, right=True) - 1


def segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T] float32 -> [N]: sums in the order of the rows, on every run; 0 for an empty segment."""
    # unsafe skips the check of the offsets, which waits for the device
    return torch.segment_reduce(rows, "sum", offsets=cu_seqlens.long(), axis=0, unsafe=True)


@jit
def segment_bounds(cu_seqlens, segment, num_rows):
    """(first row, row after the last) of a segment, int64; never beyond the rows, because bounds on a GPU have not been
    checked."""
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    return start, tl.minimum(tl.load(cu_seqlens + segment + 1).to(tl.int64), num_rows)
