"""Chooses between Triton and torch for each op, and works without Triton installed.

Kernels are compiled on a CUDA device. If TRITON_INTERPRET=1 is set in the environment before this package is imported,
they run on the CPU instead, slowly and one program after another. The tests use this on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


NOT_SPECIALISED = ("num_rows",)
"""Arguments of kernels that change from pack to pack. Triton would compile a kernel anew for 1 and for the first
multiple of 16."""
OPTIONS = {"enable_fp_fusion": True}
"""Options of every launch. Products and sums are fused into one rounding; Triton 3.10 changes the default."""


def jit(function: Callable[..., Any]) -> Any:
    """Applies `triton.jit`. Without Triton, returns the function unchanged; it is then never called."""
    return function if triton is None else triton.jit(do_not_specialize=NOT_SPECIALISED)(function)


def constant(value: Any) -> Any:
    """Wraps a module-level constant so that Triton kernels may read it."""
    return value if tl is None else tl.constexpr(value)


def multiplies_fast(index: int | None) -> bool:
    """Returns whether Triton's products use the tensor cores of a CUDA device: its compute capability must be 8.0 or
    more. Without tensor cores the kernels spill kilobytes of registers, and torch is faster."""
    if torch.version.hip or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_properties(index).major >= 8  # torch.compile evaluates this call while it traces


def use_triton(impl: str, device: torch.device) -> bool:
    """Returns whether an op uses Triton; with "auto" it does if Triton is installed and the device is a CUDA device
    of compute capability 8.0 or more.

    Raises ValueError for an unknown `impl`, and for "triton" if it cannot run on this device.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "auto":
        return triton is not None and device.type == "cuda" and multiplies_fast(device.index)
    if impl == "triton" and triton is None:
        raise ValueError('impl="triton": triton is not installed; use "auto" or "torch"')
    if impl == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(f'impl="triton" on {device.type} needs TRITON_INTERPRET=1, set before the import; use "auto"')
    return impl == "triton"
