"""Chooses the weights of a model that get a low-rank adapter.

By default (`all-linear`) these are all linear layers of the backbone and the experts of a mixture-of-experts model.
transformers keeps experts in fused 3-D tensors outside of linear layers, which peft can adapt by parameter. Four kinds
of layers get no adapter: routers, because a changed router sends tokens to experts that have not been trained on them;
layers that text never reaches (a vision tower, cross-attention without an encoder); layers of Mamba whose weights the
kernels read without calling the layer, so that an adapter would have no effect until it is merged; and layers that
share their weight with another layer, because it cannot hold the merged adapters of both.

`lora_modules_to_save` names modules that are trained whole beside the adapter, for example the embedding of new tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from fastrlhf.config import TrainConfig
from fastrlhf.models.sharding import runnable

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Parts of the names of routers, in models with experts."""
READ_BY_MAMBA = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a Mamba mixer. A Mamba mixer is recognised by its parameters A_log and D."""
RENAMED_BY_PEFT = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Endings of layer names that peft would rename, because it regards these layers as experts of an older checkpoint
format. Layers with these endings are therefore passed to peft as parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Arguments of peft's LoraConfig."""

    modules: str | list[str]
    parameters: list[str]
    excluded: str = ""
    """A regular expression for the names of modules that get no adapter; empty: none."""
    remark: str = ""
    """Remark about experts and routers, for the log."""


def choose_targets(model: PreTrainedModel, config: TrainConfig, saved: Sequence[str] = ()) -> Targets:
    """Returns the targets that `config` names or, for `all-linear`, the default targets of this model.

    `saved`: modules that are trained whole and so get no adapter. Raises ValueError if `config` names a module for
    both.
    """
    named = [*config.lora_target_parameters]
    heads = ["score"] if hasattr(model, "score") else []
    if config.lora_target_modules != ("all-linear",):
        if twice := {*config.lora_target_modules} & {*config.lora_modules_to_save}:
            raise ValueError(
                f"lora_modules_to_save: {min(twice)!r} is in lora_target_modules too; a module is trained whole or by "
                "an adapter, so name it once"
            )
        return Targets(modules=list(config.lora_target_modules), parameters=named, excluded=pattern(heads))
    idle = [*_idle(model), *_unusual(model)]
    excluded = pattern([*heads, *idle])
    experts = [name for name in _experts(model) if not _within(f"{model.base_model_prefix}.{name}", [*saved, *idle])]
    modules = dict(model.base_model.named_modules())
    apart = [
        f"{name}.{layer}" if name else layer
        for name, module in modules.items()
        if hasattr(module, "A_log") and hasattr(module, "D")
        for layer in READ_BY_MAMBA
    ]
    if not experts and not apart and not any(name.rpartition(".")[2] == "experts" for name in modules):
        return Targets(modules="all-linear", parameters=named, excluded=excluded)
    head = model.get_output_embeddings()  # in some families the head is a part of the backbone
    linear = [
        name
        for name, layer in modules.items()
        if isinstance(layer, Linear) and layer is not head and name not in apart and not ROUTERS & set(name.split("."))
    ]
    renamed = [name for name in linear if experts and name.rpartition(".")[2] in RENAMED_BY_PEFT]
    layers = _ends(name for name in linear if name not in renamed)
    if config.use_dora:  # peft does not support DoRA by parameter
        left_out = "; experts and routers are left out, since peft has no DoRA for experts in fused form"
        return Targets(modules=layers, parameters=named, excluded=excluded, remark=left_out if experts else "")
    renamed = [name for name in renamed if not _within(f"{model.base_model_prefix}.{name}", saved)]
    parameters = _ends([*experts, *(f"{name}.weight" for name in renamed)])
    remark = "; experts are adapted by parameter, routers are left out" if experts else ""
    return Targets(modules=layers, parameters=sorted({*named, *parameters}), excluded=excluded, remark=remark)


def modules_to_save(model: PreTrainedModel, named: Sequence[str]) -> list[str]:
    """Returns the full names of the modules whose names end in one of `named`, and of modules that share all their
    weights with them. A score head is left out, since it is always trained.

    Raises ValueError if a name fits no module, and for modules in 4 bits. In a model with a score head, a name that
    fits no module is ignored, since only the policy has a head over the vocabulary.
    """
    found: dict[str, Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for end in named:
        fit = {name: module for name, module in modules.items() if name == end or name.endswith(f".{end}")}
        if not fit and not hasattr(model, "score"):
            raise ValueError(f"lora_modules_to_save: {end!r} fits no module of {type(model).__name__}")
        found |= fit
    for name, module in found.items():
        if not all(weight.is_floating_point() for weight in module.parameters()):
            raise ValueError(f"lora_modules_to_save: the weights of {name} are in 4 bits and cannot be trained")
    weights = {id(weight) for module in found.values() for weight in module.parameters()}
    tied = {
        name
        for name, module in modules.items()
        if isinstance(module, Linear | Embedding) and weights.issuperset(id(weight) for weight in module.parameters())
    }
    names = sorted(name for name in {*found, *tied} if name != "score")
    return [name for name in names if not _within(name, [other for other in names if other != name])]


def check_new_rows(model: PreTrainedModel, named: Sequence[str], new: int) -> None:
    """Raises ValueError if the embeddings of `new` added tokens, or their rows of the head, would not be trained."""
    saved = modules_to_save(model, named)
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if (name := names[id(module)]) not in saved:
            end = name.rpartition(".")[2]
            raise ValueError(
                f"use_peft: the rows of {end} for {new} new tokens have to be trained; add {end} to "
                "lora_modules_to_save, or train without use_peft"
            )


@torch.no_grad()
def check_called(model: PreTrainedModel, layers: Mapping[str, Module]) -> None:
    """Raises ValueError if the forward pass of the model does not call one of the adapted `layers`, because its adapter
    would not be trained. Experts that are separate modules are exempt, since they may get no token."""
    with _silent(layers) as silent:
        try:
            _run(model)
        except Exception as error:  # the code of a model family may raise any exception
            if isinstance(error, torch.OutOfMemoryError):
                raise
            kind, told = type(model).__name__, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"lora_target_modules: {kind} does not run with this adapter ({told}); name other layers"
            ) from error
    if silent:
        name = min(silent)
        raise ValueError(
            f"lora_target_modules: {type(model).__name__} reads the weight of {name} without calling that layer, so an "
            "adapter on it would do nothing; name other layers"
        )


@torch.no_grad()
def _idle(model: PreTrainedModel) -> list[str]:
    """Returns the modules whose linear layers are never called in a pass over text, such as a vision tower. Empty if
    the model is on the meta device and cannot run there."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    linear.pop("score", None)
    with _silent(linear) as silent:
        try:
            _run(model)
        except Exception:
            if model.device.type != "meta":  # on the meta device, routing tokens to experts fails
                raise
            return []
    called = [name for name in linear if name not in silent]
    found: list[str] = []
    for name, _ in model.named_modules():  # parents first
        is_idle = any(_within(each, [name]) for each in silent) and not any(_within(each, [name]) for each in called)
        if name and is_idle and not _within(name, found):
            found.append(name)
    return found


@torch.no_grad()
def _unusual(model: PreTrainedModel) -> list[str]:
    """Returns the linear layers to which an adapter does not fit, because their class overrides the forward pass (for
    example, with a product in groups) or because another layer of the backbone has the same weight."""
    shared, head = shared_weights(model), model.get_output_embeddings()

    def fits(layer: Linear) -> bool:
        if type(layer).forward is Linear.forward or type(layer).__module__.startswith("bitsandbytes"):
            return True
        try:
            return layer(layer.weight.new_zeros(1, layer.in_features)).shape == (1, layer.out_features)
        except Exception:  # the code of a model family may raise any exception
            return False

    linear = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear)]
    return [n for n, layer in linear if not fits(layer) or (id(layer.weight) in shared and layer is not head)]


def shared_weights(model: PreTrainedModel) -> set[int]:
    """Returns the ids of the parameters that several modules own."""
    owned = [id(weight) for module in model.modules() for weight in module.parameters(recurse=False)]
    return {each for each, number in Counter(owned).items() if number > 1}


@contextmanager
def _silent(layers: Mapping[str, Module]) -> Iterator[set[str]]:
    """Context that yields the set of names of the layers that have not been called yet, without experts that are
    separate modules."""
    silent = {name for name in layers if ".experts." not in name}
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: silent.discard(name)) for name, layer in layers.items()
    ]
    try:
        yield silent
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: PreTrainedModel) -> None:
    with runnable(model) as trial:
        trial(input_ids=torch.tensor([[2, 3, 5, 7]], device=model.device), use_cache=False)


def _within(name: str, modules: Iterable[str]) -> bool:
    """Returns whether `name` is the name of one of `modules` or of a part of such a module."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def pattern(modules: Sequence[str]) -> str:
    """Returns a regular expression that matches these modules and their parts; empty if there are none."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?" if modules else ""


def num_weights(tensor: Tensor) -> int:
    """Returns the number of weights in a tensor; a 4-bit tensor has two in each byte."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def _experts(model: PreTrainedModel) -> list[str]:
    """Returns the names of the parameters that hold one matrix per expert."""
    backbone: Module = model.base_model
    return [
        f"{owner}.{name}"
        for owner, module in backbone.named_modules()
        if not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _ends(names: Iterable[str]) -> list[str]:
    """Returns the parts of the names after the layer number, each once: mlp.up_proj for model.layers.3.mlp.up_proj."""
    ends = set()
    for name in names:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        ends.add(".".join(parts[last + 1 :]))
    return sorted(ends)
