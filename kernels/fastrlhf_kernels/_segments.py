"""Sums over the sequences of a pack, as `cu_seqlens` delimits them."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """[T] int64: the segment that each row lies in.

    cu_seqlens [0, 2, 2, 3]  ->  [0, 0, 2]
    """
    row = torch.arange(num_rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, row, right=True) - 1


def segment_sum(rows: Tensor, cu_seqlens: Tensor, segment: Tensor) -> Tensor:
    """[T] float32 -> [N]: sums in the order of the rows, on every run; 0 for an empty segment. Differentiable."""
    return _SegmentSum.apply(rows, cu_seqlens, segment)  # pyright: ignore[reportReturnType]


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, cu_seqlens, segment):
        ctx.save_for_backward(segment)
        # unsafe leaves out the check of the offsets, which waits for the device
        return torch.segment_reduce(rows, "sum", offsets=cu_seqlens.long(), axis=0, unsafe=True)

    @staticmethod
    def backward(ctx, grad):
        (segment,) = ctx.saved_tensors
        return grad[segment], None, None
