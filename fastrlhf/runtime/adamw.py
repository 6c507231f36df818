"""Makes the AdamW optimiser that `optim` names: torch's, or one of bitsandbytes, with 8-bit or paged moments.

Bytes of moments per trained parameter: 8 in float32, 2.03 in 8 bits (a byte each and a float32 per 256 of them;
Dettmers et al. 2022, arXiv 2110.02861). As in transformers, embeddings keep float32 moments, and so do tensors of less
than 4,096 entries, by bitsandbytes' own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf.config import TrainConfig, require
from fastrlhf.distributed.ranks import gathered, world_size
from fastrlhf.models.sharding import first_entry, full, is_sharded, like, of_parts, part, part_size

SMALLEST_8BIT = 4096
"""Moments of tensors with fewer entries than this are kept in float32."""
BLOCK = 256
"""Number of neighbouring entries that share a scale."""
SCALES = ("absmax1", "absmax2")
"""bitsandbytes' names of the scales of the two moments."""
CONSTANT = ("qmap1", "qmap2")
"""bitsandbytes' names of constants that it stores with the moments."""


def check_optim(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError if `optim` needs bitsandbytes, which is not installed, or needs paged memory, which `device`
    lacks."""
    if config.optim != "adamw_torch_fused":
        if config.optim.startswith("paged"):
            require(device.type == "cuda", "optim", config.optim, "adamw_torch_fused or adamw_8bit without a CUDA GPU")
        _bitsandbytes(config.optim)


def moments_in_8_bits(config: TrainConfig, param: Tensor, *, is_embedding: bool) -> bool:
    """Returns whether the moments of the parameter are kept in 8 bits. Raises ValueError if a rank's part is not a
    whole number of blocks, because the scales would then differ from those of a single process."""
    if not config.optim.endswith("8bit") or is_embedding or param.numel() < SMALLEST_8BIT:
        return False
    size = part_size(param)
    held = f"{world_size()} processes hold {size} entries each of a weight of the shape {list(param.shape)}"
    rule = f"of 32 bits: {held}, not whole blocks of {BLOCK}"
    require(size % BLOCK == 0 or size == param.numel(), "optim", config.optim, rule)
    return True


def make_adamw(
    config: TrainConfig, params: Sequence[Tensor], *, rate: float, decay: float, in_8_bits: bool
) -> torch.optim.Optimizer:
    """Makes the optimiser for float32 tensors with the same learning rate and weight decay. For sharded tensors,
    `params` are the parts of this rank."""
    settings: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": decay,
    }
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW(params, fused=True, **settings)
    bits, paged = 8 if in_8_bits else 32, config.optim.startswith("paged")
    # The size of the whole parameter decides about 8 bits; bitsandbytes would decide by the size of this rank's part.
    smallest = 0 if in_8_bits else SMALLEST_8BIT
    adamw = _of_parts_too(_bitsandbytes(config.optim).optim.AdamW)
    return adamw(params, optim_bits=bits, is_paged=paged, min_8bit_size=smallest, **settings)


def moments(adamw: torch.optim.Optimizer, updated: Tensor, param: Tensor) -> dict[str, Tensor]:
    """Returns the optimiser state of a parameter by name: the two moments, the scales of 8-bit moments, and the step.
    It is empty before the first step. `updated` is the tensor that `adamw` updates for `param`. The moments of a
    sharded parameter are sharded in the same way."""
    state = {what: torch.as_tensor(x) for what, x in adamw.state.get(updated, {}).items() if what not in CONSTANT}
    if not is_sharded(param):
        return state
    return {
        what: gathered(x) if what in SCALES else of_parts(param, x) if x.shape == part(param).shape else x
        for what, x in state.items()
    }


@torch.no_grad()
def set_moments(adamw: torch.optim.Optimizer, updated: Tensor, param: Tensor, saved: dict[str, Tensor]) -> None:
    """Restores the result of `moments`, whole or sharded. If `saved` is empty, `updated` has no optimiser state
    afterwards."""
    if isinstance(adamw, torch.optim.AdamW):
        adamw.state[updated] = {what: part(like(param, value)) for what, value in saved.items()}
        return
    adamw.state[updated] = {}
    if saved:
        # This allocates the moments, in paged memory if `optim` asks for it.
        adamw.init_state(adamw.param_groups[0], updated, 0, 0)  # pyright: ignore[reportAttributeAccessIssue]
        state, first = adamw.state[updated], first_entry(param) // BLOCK
        for what, value in saved.items():
            if what == "step":
                state[what] = int(value)
            elif what in SCALES:
                state[what].copy_(full(value)[first : first + len(state[what])])
            else:
                state[what].copy_(part(like(param, value)))


def _of_parts_too(base: Any) -> Any:
    """Returns bitsandbytes' AdamW, changed to skip empty tensors. A rank may hold no part of a weight that has fewer
    rows than there are ranks, and bitsandbytes would end the process when a CUDA kernel gets an empty tensor."""

    class AdamW(base):
        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            if p.numel():
                super().update_step(group, p, gindex, pindex)
            else:
                self.state[p]["step"] += 1

    return AdamW


def _bitsandbytes(optim: str) -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        told = f"optim: {optim} needs {error.name}: pip install 'fastrlhf[bnb]', or use adamw_torch_fused"
        raise ValueError(told) from None
    return bitsandbytes
