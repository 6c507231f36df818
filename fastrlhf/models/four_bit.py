"""Weights in 4 bits under an adapter: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Linear layers of the trunk are kept as 4-bit NormalFloat, their scales quantised once more: 0.52 bytes per weight.
Heads, embeddings, norms and adapters stay as they are. Where no gradient is asked for, bitsandbytes may multiply by
another kernel, so that the first ratio of an on-policy update is 1 up to the rounding of `dtype`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import BitsAndBytesConfig, PreTrainedModel


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a model is loaded; it computes in `dtype`. Raises ValueError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit: bitsandbytes is not installed; pip install 'fastrlhf[bnb]'")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def is_four_bit(model: PreTrainedModel) -> bool:
    return getattr(model, "is_loaded_in_4bit", False)


def keep_layout(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from laying weights out anew, in place, at a pass without gradient, as it does on some CPUs:
    afterwards none would flow."""
    for layer in _layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def plain_weight(weight: Tensor) -> Tensor:
    """The weight that is computed with: dequantised, in the dtype that it was loaded in, where it is in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, state)


def make_plain(model: PreTrainedModel) -> None:
    """Replaces the layers in 4 bits, in place, by ordinary ones without data, to be given weights."""
    for name, layer in _layers(model).items():
        dtype = layer.weight.quant_state.dtype
        plain = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)
        model.set_submodule(name, plain)
    if is_four_bit(model):
        for name in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config")


def _layers(model: Module) -> dict[str, Any]:
    if "bitsandbytes" not in sys.modules:
        return {}
    from bitsandbytes.nn.modules import Linear4bit  # pyright: ignore[reportMissingImports]

    return {name: cast(Any, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
