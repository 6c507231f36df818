"""Which weights of a model get a low-rank adapter.

By default (`all-linear`) every linear layer of the backbone, and the experts of a mixture. transformers keeps experts
fused in 3-D tensors outside of linear layers; peft adapts those by parameter. Routers get no adapter, because a router
that changes sends tokens to other experts than those trained on them. Nor do layers of Mamba whose weights the kernels
read directly, without calling the layer: an adapter there would have no effect until it is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from fastrlhf.config import TrainConfig

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Parts of the names of routers, in models with experts."""
READ_BY_MAMBA = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a Mamba mixer, which has the parameters A_log and D."""
RENAMED_BY_PEFT = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Name endings that peft always takes for experts of older checkpoints: layers with these names are passed to it as
parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Arguments of peft's LoraConfig."""

    modules: str | list[str]
    parameters: list[str]
    remark: str = ""
    """Remark on experts and routers for the log."""


def choose_targets(model: PreTrainedModel, config: TrainConfig) -> Targets:
    """The targets that `config` names, or, for `all-linear`, those of this model."""
    named = [*config.lora_target_parameters]
    if config.lora_target_modules != ("all-linear",):
        return Targets(modules=list(config.lora_target_modules), parameters=named)
    experts = _experts(model)
    modules = dict(model.base_model.named_modules())
    apart = [
        f"{name}.{layer}" if name else layer
        for name, module in modules.items()
        if hasattr(module, "A_log") and hasattr(module, "D")
        for layer in READ_BY_MAMBA
    ]
    if not experts and not apart and not any(name.rpartition(".")[2] == "experts" for name in modules):
        return Targets(modules="all-linear", parameters=named)
    head = model.get_output_embeddings()  # part of the backbone in some families
    linear = [
        name
        for name, layer in modules.items()
        if isinstance(layer, Linear) and layer is not head and name not in apart and not ROUTERS & set(name.split("."))
    ]
    renamed = [name for name in linear if experts and name.rpartition(".")[2] in RENAMED_BY_PEFT]
    layers = _ends(name for name in linear if name not in renamed)
    if config.use_dora:  # peft has no DoRA by parameter
        left_out = "; experts and routers are left out, since peft has no DoRA for experts in fused form"
        return Targets(modules=layers, parameters=named, remark=left_out if experts else "")
    parameters = _ends([*experts, *(f"{name}.weight" for name in renamed)])
    remark = "; experts are adapted by parameter, routers are left out" if experts else ""
    return Targets(modules=layers, parameters=sorted({*named, *parameters}), remark=remark)


@torch.no_grad()
def check_called(model: PreTrainedModel, layers: Mapping[str, Module]) -> None:
    """Raises ValueError, naming one of the adapted `layers`, where the forward of the model does not call it: its
    adapter would not be trained. Experts that are separate modules are exempt, since they may get no token."""
    silent = {name for name in layers if ".experts." not in name}
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: silent.discard(name)) for name, layer in layers.items()
    ]
    model(input_ids=torch.tensor([[2, 3, 5, 7]], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    if silent:
        name = min(silent)
        raise ValueError(
            f"lora_target_modules: {type(model).__name__} reads the weight of {name} without calling that layer, so an "
            "adapter on it would do nothing; name other layers"
        )


def num_weights(tensor: Tensor) -> int:
    """Number of weights in a tensor; a 4-bit tensor packs two into a byte."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def _experts(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold one matrix per expert."""
    backbone: Module = model.base_model
    return [
        f"{owner}.{name}"
        for owner, module in backbone.named_modules()
        if not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _ends(names: Iterable[str]) -> list[str]:
    """The part of a name after the layer number (mlp.up_proj of model.layers.3.mlp.up_proj), once for all layers."""
    ends = set()
    for name in names:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        ends.add(".".join(parts[last + 1 :]))
    return sorted(ends)
