"""Resolves `device: auto` and `dtype: auto`, and describes device and precision in the first lines of a run."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from fastrlhf.config import TrainConfig
from fastrlhf.config.paths import at_start, changed
from fastrlhf.models.adapters import holds_merged_adapter

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainConfig)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

BFLOAT16_FROM = (8, 0)
"""The lowest compute capability of a GPU with matrix units for bfloat16."""


def resolve_device(device: str) -> torch.device:
    """Returns the device; "auto" is the first CUDA GPU, or else the CPU. Raises ValueError for an unknown device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} is not available, because torch finds no CUDA GPU; use auto or cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is not a device; give auto, cpu or cuda") from error
    if found.index is not None and found.type == "cuda":
        torch.cuda.set_device(found)  # kernels and graphs run on the current device
    return found


def resolved(config: Config, kind: type, trainer: str, model: PreTrainedModel | None = None) -> Config:
    """Returns the configuration with absolute paths and a dtype, as `at_start` and `with_dtype` do. Every trainer
    calls this first."""
    return with_dtype(at_start(config, kind, trainer), model)


def with_dtype(config: Config, model: PreTrainedModel | None = None) -> Config:
    """Returns the configuration with `dtype: auto` replaced by the dtype of `model`, if a program has passed one, or by
    the fast dtype of the device: bfloat16 on a GPU of compute capability 8.0 or more, float32 elsewhere. Weights with a
    merged adapter stay in float32, because rounding them to bfloat16 loses a part of what the adapter learned.

    Raises ValueError for an unknown device.
    """
    if config.dtype != "auto":
        return config
    names = {dtype: name for name, dtype in DTYPES.items()}
    given = names.get(model.dtype) if isinstance(model, PreTrainedModel) else None
    return changed(config, dtype=given or fast_dtype(config, _multiplies_bfloat16(resolve_device(config.device))))


def fast_dtype(config: TrainConfig, multiplies_bfloat16: bool) -> str:
    """Returns the dtype that `auto` stands for on a device that has, or has no, matrix units for bfloat16."""
    if not multiplies_bfloat16:
        return "float32"
    for source in filter(None, (config.model_name_or_path, *getattr(config, "models", ()))):
        if holds_merged_adapter(source):
            told = "holds weights with a merged adapter, of which bfloat16, the faster setting, would lose a part"
            log.info("dtype: auto is float32, because %s %s", source, told)
            return "float32"
    return "bfloat16"


def _multiplies_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_FROM


def describe_precision(config: TrainConfig) -> list[str]:
    """Returns lines about device and dtype and, on a GPU, about settings that would make the run faster or smaller."""
    device = resolve_device(config.device)
    if device.type != "cuda":
        return [f"device: {device}, weights in {config.dtype}"]
    name = torch.cuda.get_device_name(device)
    lines = [f"device: {name}, weights in {config.dtype}"]
    if config.dtype == "float32" and _multiplies_bfloat16(device):
        lines.append(describe_float32(torch.get_float32_matmul_precision()))
    if not config.activation_checkpointing:
        lines.append(OFFER)
    return lines


def describe_float32(precision: str) -> str:
    """Returns a line about the cost of float32 on a GPU with matrix units; `precision` is the value of
    torch.get_float32_matmul_precision()."""
    if precision != "highest":
        return f"dtype: float32 with TF32 products, because torch's float32 matmul precision is {precision!r}"
    return (
        "dtype: float32 with TF32 off: matrix products do not use the GPU's matrix units and take up to 16 times as "
        "long as in bfloat16; dtype bfloat16 (or auto) is the fast setting"
    )


OFFER = (
    "activation_checkpointing: false, the faster setting; true keeps a fraction of the activations in memory and takes "
    "about a third more time (fastrlhf plan counts both)"
)
