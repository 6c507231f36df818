"""Stores the weights under an adapter in 4 bits by bitsandbytes: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Linear layers of the backbone are stored as 4-bit NormalFloat, and their scales are quantised too: 0.52 bytes per
weight. Heads, embeddings, norms and adapters keep their precision. In passes without gradients bitsandbytes may use
another kernel, so the first ratio of an on-policy update is 1 only up to the rounding of `dtype`.

A model that bitsandbytes has stored in 4 bits is used in the same way, with its own settings. Models stored in other
quantised formats are refused.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

DEQUANTISED = {"mxfp4": "Mxfp4Config(dequantize=True)", "fp8": "FineGrainedFP8Config(dequantize=True)"}
"""Quantised format -> the transformers setting that dequantises it on loading."""


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns the settings that quantise a model on loading; the model then computes in `dtype`. Raises ValueError if
    bitsandbytes is not installed."""
    check_installed("load_in_4bit: bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_installed(what: str) -> None:
    """Raises ValueError, whose message starts with `what`, if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{what} is not installed; pip install 'fastrlhf[bnb]'")


def stored_in_four_bit(config: PretrainedConfig, source: str, field: str) -> bool:
    """Returns whether the weights of a model are stored in 4 bits by bitsandbytes; an adapter can be trained over them.

    Raises ValueError, naming `field`, if they are stored in another quantised format, whose weights have no gradients,
    or if bitsandbytes is needed and not installed.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(settings.get("quant_method", "an unknown method"))
    if settings.get("load_in_4bit"):
        check_installed(f"{field}: {source!r} is stored in 4 bits by bitsandbytes, which")
        return True
    name = "8 bits by bitsandbytes" if settings.get("load_in_8bit") else method
    fix = "give the model that it was made from, with use_peft and load_in_4bit if memory is short"
    if method in DEQUANTISED:
        call = f"AutoModelForCausalLM.from_pretrained({source!r}, quantization_config={DEQUANTISED[method]})"
        fix = f"save a plain copy once, by {call}.save_pretrained(FOLDER), and give FOLDER"
    raise ValueError(f"{field}: {source!r} is stored in {name}, and such weights cannot be trained; {fix}")


def check_trainable(model: PreTrainedModel, use_peft: bool) -> None:
    """Raises ValueError if all weights are to be trained although some are in 4 bits."""
    if is_four_bit(model):
        check_adapter(use_peft, str(model.name_or_path))


def check_adapter(use_peft: bool, source: str) -> None:
    """Raises ValueError if all weights of the model in `source`, which are in 4 bits, are to be trained."""
    if not use_peft:
        raise ValueError(
            f"use_peft: must be true for {source!r}, whose weights are in 4 bits; only an adapter over them can be "
            "trained"
        )


def is_four_bit(model: PreTrainedModel) -> bool:
    return getattr(model, "is_loaded_in_4bit", False)


def keep_layout(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from rearranging weights in place. On some CPUs it does so in a pass without gradients, after
    which no gradient would flow."""
    for layer in _layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def quantize_without_data(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turns a model on the meta device, in place, into its 4-bit form without data."""
    from bitsandbytes.nn.modules import Params4bit  # pyright: ignore[reportMissingImports]
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization(dtype))
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
    keep_layout(model)
    for layer in _layers(model).values():
        packed, state = empty_weight(layer.weight.shape, dtype)
        made: Any = Params4bit  # its __new__ takes more arguments than its base's __init__ declares
        layer.weight = made(packed, requires_grad=False, quant_state=state, bnb_quantized=True)


def empty_weight(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Returns a 4-bit weight of this shape without data, and its QuantState of bitsandbytes: an 8-bit scale for each
    block of 64 weights, and a float32 scale for each 256 of these scales (QLoRA, section 3)."""
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
    """Returns the scales and tables of a weight in 4 bits; empty for other weights."""
    state = getattr(weight, "quant_state", None)
    return [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def plain_weight(weight: Tensor) -> Tensor:
    """Returns a weight unchanged or, if it is in 4 bits, dequantised in the dtype in which it was loaded."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, state)


def make_plain(model: PreTrainedModel) -> None:
    """Replaces the 4-bit layers, in place, by ordinary ones without data; the caller assigns their weights."""
    for name, layer in _layers(model).items():
        dtype = layer.weight.quant_state.dtype
        plain = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)
        model.set_submodule(name, plain)
    if is_four_bit(model):
        for name in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        # If the weights were stored in 4 bits, saving would try to undo how they were read.
        changes: Any = model
        if hasattr(changes, "_weight_conversions"):
            changes._weight_conversions = [each for each in changes._weight_conversions if not _of_bitsandbytes(each)]
        vars(model.config).pop("quantization_config")


def _of_bitsandbytes(conversion: Any) -> bool:
    """Returns whether one of transformers' weight conversions reads weights of bitsandbytes."""
    return any("bitsandbytes" in type(step).__module__ for step in getattr(conversion, "operations", ()))


def _layers(model: Module) -> dict[str, Any]:
    if "bitsandbytes" not in sys.modules:
        return {}
    from bitsandbytes.nn.modules import Linear4bit  # pyright: ignore[reportMissingImports]

    return {name: cast(Any, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
