"""Argument checks of the ops. A failed check raises a ValueError that names the argument; no check waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
BOOLS = (torch.bool,)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Raises ValueError unless `tensor` has exactly this shape, this device and one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {shape}, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{name} is a DTensor and this rank holds only a part of it: pass {name}.full_tensor()")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first argument, got {tensor.device}")


def check_rows(name: str, tensor: Tensor, rank: int = 1) -> None:
    """Raises ValueError unless `tensor`, an op's first argument, is a floating-point tensor with `rank` dimensions."""
    if not isinstance(tensor, Tensor) or tensor.dim() != rank:
        found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a tensor with {rank} dimension{'s' * (rank > 1)}, got {found}")
    check_tensor(name, tensor, tuple(tensor.shape), tensor.device)


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int, device: torch.device) -> None:
    """Raises ValueError unless `cu_seqlens` has shape (N+1,) and non-decreasing integers from 0 to `num_rows`.

    The values are checked only on the CPU, because on a GPU the check would wait for the device.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must be a tensor of shape (N+1,); without sequences it holds the single number 0")
    check_tensor("cu_seqlens", cu_seqlens, tuple(cu_seqlens.shape), device, INTEGERS)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_rows or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the number of rows {num_rows}, got {cu_seqlens.tolist()}")


def check_range(name: str, value: float, low: float, high: float, *, open_ends: bool = False) -> None:
    """Raises ValueError unless low <= value <= high; with `open_ends`, low < value < high."""
    if not (low < value < high if open_ends else low <= value <= high):
        raise ValueError(f"{name} must be in {f'({low}, {high})' if open_ends else f'[{low}, {high}]'}, got {value}")


def check_first_derivative(op: str) -> None:
    """Raises RuntimeError inside a backward with create_graph=True: the ops have no second derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: create_graph must be False")


def divisor(name: str, count: float | Tensor) -> float | Tensor:
    """Returns the divisor of a sum over `count` items: `count`, or 1 if `count` is 0 (the sum is then 0 too).

    Raises ValueError for a negative number and for a tensor that is not 0-dim.
    """
    if isinstance(count, Tensor):
        if count.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got shape {tuple(count.shape)}")
        return (count + (count == 0)).float()
    if not count >= 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count or 1
