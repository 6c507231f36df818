"""Weights in 4 bits under an adapter: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Linear layers of the backbone are kept as 4-bit NormalFloat, their scales quantised once more: 0.52 bytes per weight.
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


def quantize_without_data(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes of a model on the meta device, in place, what loading it in 4 bits gives, but for the data."""
    from bitsandbytes.nn.modules import Params4bit  # pyright: ignore[reportMissingImports]
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization(dtype))
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
    keep_layout(model)
    for layer in _layers(model).values():
        packed, state = empty_weight(layer.weight.shape, dtype)
        made: Any = Params4bit  # whose __new__ takes more than its base's __init__ says
        layer.weight = made(packed, requires_grad=False, quant_state=state, bnb_quantized=True)


def empty_weight(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A weight of this shape in 4 bits without data, and bitsandbytes' QuantState of it: an 8-bit scale for each block
    of 64, and a float32 scale for each 256 of those (QLoRA, section 3)."""
    from bitsandbytes.functional import QuantState  # pyright: ignore[reportMissingImports]

    blocks = -(-shape.numel() // 64)
    outer = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=outer,
    )
    return torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8), state


def state_tensors(weight: Tensor) -> list[Tensor]:
    """What belongs to a weight in 4 bits beside itself; nothing of any other."""
    state = getattr(weight, "quant_state", None)
    return [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


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
