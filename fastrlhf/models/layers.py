"""How the backbone of a model is computed: which attention, Liger's kernels, torch.compile. The numbers stay the same
but for rounding, and that is checked before a run starts.

torch.compile gets the layers one by one, in packed forwards alone, so that sampling is as it was. Layers of a kind
share one compiled code, whatever the length of a pack (`dynamic`), and activation checkpointing recomputes with it.
Attention breaks the graph once per layer (models/attention.py). What is fused are the norms, rotary positions,
activations and residuals between it and the matrix products.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MethodType

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastrlhf.config import TrainConfig
from fastrlhf.models.attention import choose_attention
from fastrlhf.models.forward import check_packed_forward, own_forward
from fastrlhf_kernels import _triton

LIGER = ("rope", "rms_norm", "swiglu", "geglu")
"""What is taken of Liger's kernels, each where the model has it. The losses are our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """The keys of a run that all of its models share."""

    attn_implementation: str = "auto"
    use_liger_kernel: bool = False
    torch_compile: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> LayerOptions:
        return cls(
            attn_implementation=config.attn_implementation,
            use_liger_kernel=config.use_liger_kernel,
            torch_compile=config.torch_compile,
        )


def prepare_layers(model: PreTrainedModel, options: LayerOptions) -> str:
    """Makes packed forwards of the model, and of copies of it, run as `options` say; returns the attention's name.

    Raises ValueError where something asked for cannot run this model here, and where a pack then gives other numbers
    than the plain model gives one sequence at a time.
    """
    expected = own_forward(model)
    attention = choose_attention(model, options.attn_implementation)
    if options.use_liger_kernel:
        apply_liger(model)
    if options.torch_compile:
        compile_layers(model)
    try:
        check_packed_forward(model, expected)
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).partition("\n")[0]
        raise ValueError(f"torch_compile: torch cannot compile here ({reason}); set it to false") from error
    return attention


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the layers of the backbone for packed forwards: at the first one without gradients, and at the first
    with.

    Raises ValueError where the backbone has no layers that transformers could checkpoint one by one.
    """
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"torch_compile: {type(model).__name__} has no layers to compile one by one; set it to false")
    # The roles of a run (with and without gradients or an adapter) share the code of a layer, and its count.
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 64)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # a method, so that a copy of the layer calls its own


def _forward(layer: Module, *arguments: object, **keywords: object) -> Tensor:
    forward = type(layer).forward
    # `forward.hidden_states` alone gives this keyword; sampling may give a plan, for its prefill.
    return (_compiled(forward) if "attention_backend" in keywords else forward)(layer, *arguments, **keywords)


@cache
def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(forward, dynamic=True)


def check_liger(device: torch.device) -> None:
    """Raises ValueError where Liger is not installed or there is no GPU."""
    if find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel: liger-kernel is not installed; pip install 'fastrlhf[liger]'")
    if device.type != "cuda" and not _triton.INTERPRETED:
        raise ValueError(f"use_liger_kernel: Liger needs a CUDA GPU, and the run is on {device}; set it to false")


def apply_liger(model: PreTrainedModel) -> None:
    """Puts Liger's kernels (Hsu et al. 2024, arXiv 2410.10989) into the backbone, by its public function for the
    model's `model_type`. Its rotary positions hold for every model of that type in the process.

    Raises ValueError where Liger is not installed, has no function for the type, or where there is no GPU.
    """
    kind = model.config.model_type
    check_liger(model.device)
    apply = getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{kind}", None)
    if apply is None:
        raise ValueError(f"use_liger_kernel: Liger has no kernels for model_type {kind!r}; set it to false")
    switches = [name for name in inspect.signature(apply).parameters if name != "model"]
    apply(**{name: name in LIGER for name in switches}, model=model)
