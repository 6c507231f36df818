"""Optional use of Triton: the path that an op takes, and helpers shared by all kernels.

Kernels are compiled on a CUDA device. With TRITON_INTERPRET=1 in the environment, set before this package is imported,
they run on the CPU instead, slowly and one program after another, which is how they are tested without a GPU.
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


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function itself, which is then never called."""
    return function if triton is None else triton.jit(function)


def constant(value: Any) -> Any:
    """A module constant that kernels may read."""
    return value if tl is None else tl.constexpr(value)


def use_triton(impl: str, device: torch.device) -> bool:
    """Whether an op takes its Triton path; "auto" does so on a CUDA device if Triton is installed.

    Raises ValueError for an unknown `impl`, and for "triton" where it cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "auto":
        return triton is not None and device.type == "cuda"
    if impl == "triton" and triton is None:
        raise ValueError('impl="triton": triton is not installed; use "auto" or "torch"')
    if impl == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(f'impl="triton" on {device.type} needs TRITON_INTERPRET=1, set before the import; use "auto"')
    return impl == "triton"
