"""The AdamW that `optim` names: torch's, or those of bitsandbytes, whose moments take 8 bits or lie in paged memory.

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
from fastrlhf.models.sharding import like

SMALLEST_8BIT = 4096
"""Entries of the smallest tensor whose moments are kept in 8 bits."""
CONSTANT = ("qmap1", "qmap2")
"""What bitsandbytes keeps with the moments and never changes."""


def check_optim(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where `optim` is of bitsandbytes and that is not installed, or cannot page on `device`."""
    if config.optim != "adamw_torch_fused":
        if config.optim.startswith("paged"):
            require(device.type == "cuda", "optim", config.optim, "adamw_torch_fused or adamw_8bit without a CUDA GPU")
        _bitsandbytes(config.optim)


def moments_in_8_bits(config: TrainConfig, param: Tensor, *, is_embedding: bool) -> bool:
    return config.optim.endswith("8bit") and not is_embedding and param.numel() >= SMALLEST_8BIT


def make_adamw(
    config: TrainConfig, params: Sequence[Tensor], *, rate: float, decay: float, in_8_bits: bool
) -> torch.optim.Optimizer:
    """Over float32 tensors that share a rate and a decay."""
    settings: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": decay,
    }
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW(params, fused=True, **settings)
    bits, paged = 8 if in_8_bits else 32, config.optim.startswith("paged")
    return _bitsandbytes(config.optim).optim.AdamW(params, optim_bits=bits, is_paged=paged, **settings)


def moments(adamw: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """By name: the two moments, their scales where they are of 8 bits, the step. Empty before the first step."""
    state = adamw.state.get(param, {})
    return {what: torch.as_tensor(value) for what, value in state.items() if what not in CONSTANT}


@torch.no_grad()
def set_moments(adamw: torch.optim.Optimizer, param: Tensor, saved: dict[str, Tensor]) -> None:
    """Puts back what `moments` gave; where that is empty, `param` is as new."""
    if isinstance(adamw, torch.optim.AdamW):
        adamw.state[param] = {what: like(param, value) for what, value in saved.items()}
        return
    adamw.state[param] = {}
    if saved:
        # It allocates: in paged memory, where that is asked for.
        adamw.init_state(adamw.param_groups[0], param, 0, 0)  # pyright: ignore[reportAttributeAccessIssue]
        state = adamw.state[param]
        for what, value in saved.items():
            state[what] = int(value) if what == "step" else state[what].copy_(value)


def _bitsandbytes(optim: str) -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        told = f"optim: {optim} needs {error.name}: pip install 'fastrlhf[bnb]', or take adamw_torch_fused"
        raise ValueError(told) from None
    return bitsandbytes
