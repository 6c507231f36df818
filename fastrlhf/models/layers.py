"""How the backbone of a model is computed: which attention, Liger's kernels, torch.compile, or one sequence at a time.
The numbers stay the same except for rounding, which is checked before a run starts.

torch.compile gets the layers one by one, in packed forwards only, so that sampling is not changed. Layers of one class
share their compiled code, for packs of any length (`dynamic`), and activation checkpointing recomputes with it.
Attention breaks the graph once per layer (models/attention.py). The norms, rotary positions, activations and residuals
between attention and the matrix products are fused.
"""

from __future__ import annotations

import inspect
import logging
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
from fastrlhf.models.attention import choose_attention, run_alone
from fastrlhf.models.forward import set_logit_map
from fastrlhf.models.positions import rope_obstacle
from fastrlhf.models.probe import check_packed_forward, find_logit_map, is_scorer, obstacle_to_packs, own_forward
from fastrlhf_kernels import _triton

log = logging.getLogger(__name__)

LIGER = ("rope", "rms_norm", "swiglu", "geglu")
"""The kernels of Liger that are used, each if the model has the layer. The losses are our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """The keys of a run that hold for all of its models."""

    attn_implementation: str = "auto"
    use_liger_kernel: bool = False
    torch_compile: bool = False
    max_length: int | None = None
    """Number of tokens of the longest sequence; None: unknown."""

    @classmethod
    def of(cls, config: TrainConfig) -> LayerOptions:
        return cls(
            attn_implementation=config.attn_implementation,
            use_liger_kernel=config.use_liger_kernel,
            torch_compile=config.torch_compile,
            max_length=config.max_length,
        )


def prepare_layers(model: PreTrainedModel, options: LayerOptions) -> str:
    """Makes packed forwards of the model, and of copies of it, run as `options` say. Returns the attention in words.

    A model whose sequences cannot share a pass runs them one by one, which is logged with the reason. Raises ValueError
    if an option cannot be had with this model here, and if the numbers are not those of the plain model, one sequence
    at a time.
    """
    expected = own_forward(model)
    if not is_scorer(model):
        set_logit_map(model, find_logit_map(model))
    attention = choose_attention(model, options.attn_implementation)
    reason = rope_obstacle(model.config, options.max_length) or obstacle_to_packs(model, expected)
    if reason:
        attention = _run_alone(model, options, reason)
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


def _run_alone(model: PreTrainedModel, options: LayerOptions, reason: str) -> str:
    kind = type(model).__name__
    because = f"the packed forward of {kind} {reason}"
    if options.attn_implementation != "auto":
        raise ValueError(f"attn_implementation: {because}; set it to auto, and its sequences run one by one")
    if options.torch_compile:
        raise ValueError(f"torch_compile: {because}, so that its sequences run one by one; set it to false")
    run_alone(model, reason)
    log.warning(
        "%s: the sequences of a pack run one by one with the model's own attention, which is exact and slower, and a "
        "shared prompt is computed once per response: the packed forward %s",
        *(kind, reason),
    )
    return f"{model.config._attn_implementation}, one sequence at a time"


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the layers of the backbone for packed forwards: at the first one without gradients, and at the first
    with.

    Raises ValueError if the backbone has no layers that transformers could checkpoint one by one.
    """
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"torch_compile: {type(model).__name__} has no layers to compile one by one; set it to false")
    # The roles of a run (with and without gradients or an adapter) share the code of a layer, and its count.
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 64)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # a bound method: a copy of the layer calls its own


def _forward(layer: Module, *arguments: object, **keywords: object) -> Tensor:
    forward = type(layer).forward
    # Only `forward.hidden_states` gives this keyword; the prefill of sampling may give a plan.
    return (_compiled(forward) if "attention_backend" in keywords else forward)(layer, *arguments, **keywords)


@cache
def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(forward, dynamic=True)


def check_liger(device: torch.device) -> None:
    """Raises ValueError if Liger is not installed or there is no GPU."""
    if find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel: liger-kernel is not installed; pip install 'fastrlhf[liger]'")
    if device.type != "cuda" and not _triton.INTERPRETED:
        raise ValueError(f"use_liger_kernel: Liger needs a CUDA GPU, and the run is on {device}; set it to false")


def apply_liger(model: PreTrainedModel) -> None:
    """Puts Liger's kernels (Hsu et al. 2024, arXiv 2410.10989) into the backbone, by its public function for the
    model's `model_type`. Its rotary positions are used by every model of that type in the process.

    Raises ValueError if Liger is not installed or has no function for the type, or if there is no GPU.
    """
    kind = model.config.model_type
    check_liger(model.device)
    apply = getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{kind}", None)
    if apply is None:
        raise ValueError(f"use_liger_kernel: Liger has no kernels for model_type {kind!r}; set it to false")
    switches = [name for name in inspect.signature(apply).parameters if name != "model"]
    apply(**{name: name in LIGER for name in switches}, model=model)
