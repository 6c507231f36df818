"""Chooses how the backbone of a model is computed: the attention kernel, Liger's kernels, torch.compile, or one
sequence at a time. A check before the run makes sure that the results change only by rounding.

torch.compile compiles the layers one by one, for packed forward passes only, so that sampling is unchanged. Layers of
one class share their compiled code, which works for packs of any length (`dynamic`) and for recomputation by activation
checkpointing. Attention breaks the graph once per layer (models/attention.py). Norms, rotary positions, activations and
residuals between attention and the matrix products are fused.
"""

from __future__ import annotations

import inspect
import logging
import re
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
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastrlhf.config import TrainConfig
from fastrlhf.models.attention import choose_attention, run_alone, run_like
from fastrlhf.models.forward import logit_map, set_logit_map
from fastrlhf.models.noise import silence, silent_config
from fastrlhf.models.positions import rope_obstacle
from fastrlhf.models.probe import check_packed_forward, find_logit_map, is_scorer, obstacle_to_packs, own_forward
from fastrlhf.models.sharding import runnable
from fastrlhf.models.small import small_config, small_model
from fastrlhf_kernels import _triton

log = logging.getLogger(__name__)

LIGER = ("rope", "rms_norm", "swiglu", "geglu")
"""The kernels of Liger that replace layers of the model, if it has them. Liger's losses are not used."""

_FORESEEN: dict[str, str | None] = {}
"""Results of `foresee_alone` by configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """Configuration keys that apply to all models of a run."""

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
    """Makes packed forward passes of the model, and of its copies, run as `options` say. Returns a description of the
    attention for the log.

    If the sequences of a model cannot share a pass, they run one by one, and the reason is logged. Raises ValueError if
    an option is not available for this model on this machine, and if the results differ from those of the plain model
    on one sequence at a time.
    """
    with runnable(model) as trial:
        attention = _prepare(trial, options)
        if trial is not model:
            run_like(model, trial)
            if not is_scorer(model):
                set_logit_map(model, logit_map(trial))
            _change_layers(model, options)
    return attention


def _change_layers(model: PreTrainedModel, options: LayerOptions) -> None:
    if options.use_liger_kernel:
        apply_liger(model)
    if options.torch_compile:
        compile_layers(model)


def _prepare(model: PreTrainedModel, options: LayerOptions) -> str:
    expected = own_forward(model)
    if not is_scorer(model):
        set_logit_map(model, find_logit_map(model))
    attention = choose_attention(model, options.attn_implementation)
    reason = rope_obstacle(model.config, options.max_length) or obstacle_to_packs(model, expected)
    if reason:
        attention = _run_alone(model, options, reason)
    _change_layers(model, options)
    try:
        check_packed_forward(model, expected)
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).partition("\n")[0]
        raise ValueError(f"torch_compile: torch cannot compile here ({reason}); set it to false") from error
    return attention


def describe_alone(reason: str) -> str:
    """Describes how packs run if their sequences cannot share a pass, for the first lines of a run and for plans."""
    return (
        "the sequences of a pack run one by one with the model's own attention, which is exact and slower, and a "
        f"shared prompt is computed once per response: the packed forward {reason}"
    )


def foresee_alone(config: PretrainedConfig, max_length: int | None) -> str | None:
    """Returns the reason why the sequences of a pack will run one by one, without loading the model; empty if they will
    share a pass. It is measured on a small random model with the same kinds of layers. Returns None if no such model
    can be made.

    Raises ValueError as the run will, for rotary positions that rule out a run.
    """
    if reason := rope_obstacle(config, max_length):
        return reason
    key = config.to_json_string()
    if key not in _FORESEEN:
        _FORESEEN[key] = _measure(config)
    return _FORESEEN[key]


def _measure(config: PretrainedConfig) -> str | None:
    try:
        small = small_model(silent_config(small_config(config)))
        silence(small)
        expected = own_forward(small)
        set_logit_map(small, find_logit_map(small))
        return re.sub(r" by \S+ nats$", "", obstacle_to_packs(small, expected))  # the number is not the real model's
    except Exception:  # the class of the configuration or of the model may raise any exception
        return None


def _run_alone(model: PreTrainedModel, options: LayerOptions, reason: str) -> str:
    kind = type(model).__name__
    because = f"the packed forward of {kind} {reason}"
    if options.attn_implementation != "auto":
        raise ValueError(f"attn_implementation: {because}; set it to auto, so that its sequences run one by one")
    if options.torch_compile:
        raise ValueError(
            f"torch_compile: {because}; its sequences must run one by one, which torch_compile does not support. Set "
            "torch_compile to false"
        )
    run_alone(model, reason)
    log.warning("%s: %s", kind, describe_alone(reason))
    return f"{model.config._attn_implementation}, one sequence at a time"


def compile_layers(model: PreTrainedModel) -> None:
    """Makes torch.compile compile the layers of the backbone in the first packed forward pass without gradients and in
    the first one with gradients.

    Raises ValueError if the backbone has no layers that transformers could checkpoint one by one.
    """
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"torch_compile: {type(model).__name__} has no layers to compile one by one; set it to false")
    # All models of a run (with and without gradients or adapters) share the code of a layer and so its limit of
    # compilations.
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 64)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # a bound method, so that a copy of the layer calls itself


def _forward(layer: Module, *arguments: object, **keywords: object) -> Tensor:
    forward = type(layer).forward
    # Only `forward.hidden_states` passes this keyword; the prefill of sampling does not.
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
    """Replaces layers of the backbone by Liger's kernels (Hsu et al. 2024, arXiv 2410.10989), through Liger's public
    function for the `model_type`. Every model of that type in the process then uses Liger's rotary positions.

    Raises ValueError if Liger is not installed or has no function for this type, or if there is no GPU.
    """
    kind = model.config.model_type
    check_liger(model.device)
    apply = getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{kind}", None)
    if apply is None:
        raise ValueError(f"use_liger_kernel: Liger has no kernels for model_type {kind!r}; set it to false")
    switches = [name for name in inspect.signature(apply).parameters if name != "model"]
    apply(**{name: name in LIGER for name in switches}, model=model)
