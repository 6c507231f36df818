"""Trains LoRA adapters (Hu et al. 2021, arXiv 2106.09685), rsLoRA and DoRA by peft, over base weights that all models
of a run share.

An adapter is injected into a model. The model keeps its class, its backbone is still `model.base_model`, and only the
adapter's weights, a score head and the modules in `lora_modules_to_save` have gradients. The reference is a second set
of modules around the same frozen tensors, without the adapter, so that no adapter has to be switched on and off; only
trained modules are copied. roles.py builds the other models of a run on the same tensors.

adapter_targets.py decides which layers and experts get an adapter.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.config import TrainConfig
from fastrlhf.distributed.ranks import on_first
from fastrlhf.models.adapter_targets import (
    check_called,
    choose_targets,
    modules_to_save,
    num_weights,
    pattern,
    shared_weights,
)
from fastrlhf.models.forward import disable_activation_checkpointing
from fastrlhf.models.four_bit import is_four_bit, make_plain, plain_weight
from fastrlhf.models.parts import make_whole, whole_weight
from fastrlhf.models.sharding import assign, beginnings, is_sharded, on_first_rank

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

log = logging.getLogger(__name__)

ADAPTER = "default"
"""peft's name for the only adapter of a model."""
SCORE = "base_model.model.score.weight"
"""Name of the score head's weight in an adapter's file."""
_BASE = "fastrlhf_base"  # attribute of a model with an adapter: fingerprint of its base


def add_adapter(model: PreTrainedModel, config: TrainConfig, base: str) -> None:
    """Freezes the model and injects an adapter as the `lora_` keys of `config` say. Its weights are drawn with the seed
    of `config`, and until the first step it does not change the model's output. A `score` head and the modules in
    `lora_modules_to_save` remain trainable. `base` is the folder or hub name that the model was loaded from. Logs the
    share of the weights that have an adapter.

    Raises ValueError if no module of the model fits `lora_target_modules` or `lora_modules_to_save`, and for adapters
    on embeddings and heads, whose weights are read without calling the module.
    """
    from peft import LoraConfig

    saved = modules_to_save(model, config.lora_modules_to_save)
    chosen = choose_targets(model, config, saved)
    settings = LoraConfig(
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=chosen.modules,
        target_parameters=chosen.parameters or None,
        exclude_modules=chosen.excluded or None,
        modules_to_save=saved or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        base_model_name_or_path=base,
    )
    if config.use_dora:  # the norms of the weights are a part of the adapter
        for module in model.modules():
            make_whole(module)
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    apart = [module.weight for module in outer if module is not None]
    shared = shared_weights(model)
    try:
        inject(settings, model, config.seed)
    except ValueError as error:
        named = ", ".join((*config.lora_target_modules, *config.lora_target_parameters))
        raise ValueError(f"lora_target_modules: {named} fit no layer of {type(model).__name__}: {error}") from error
    for _, name, layer in _adapted(model):
        if any(_base_weight(layer) is weight for weight in apart):
            raise ValueError(f"lora_target_modules: {name} is an embedding or a head; name layers of the backbone")
        if id(_base_weight(layer)) in shared:
            raise ValueError(
                f"lora_target_modules: {name} shares its weight with another layer, so their adapters could not be "
                "merged; name other layers"
            )
    if model.device.type != "meta":
        names = {id(layer): name for name, layer in model.named_modules()}
        check_called(model, {names[id(layer)]: cast(Module, layer) for _, _, layer in _adapted(model)})
    adapted = {id(weight): weight for weight in (_base_weight(layer) for _, _, layer in _adapted(model))}
    log.info(
        "LoRA: rank %d on %d tensors, %.0f %% of the weights of %s%s%s",
        config.lora_r,
        len(adapted),
        100 * sum(map(num_weights, adapted.values())) / sum(num_weights(p) for n, p in _own(model)),
        type(model).__name__,
        chosen.remark,
        f"; trained whole: {', '.join(saved)}" if saved else "",
    )


def inject(settings: LoraConfig, model: PreTrainedModel, seed: int) -> None:
    """Freezes the model and injects an adapter drawn with `seed`. A score head and the modules to save in `settings`
    remain trainable."""
    from peft import inject_adapter_in_model

    device, saved, excluded = model.device, settings.modules_to_save, settings.exclude_modules
    if saved:  # peft's wrapper is avoided: it renames these modules and keeps a copy of their initial weights
        first = excluded if isinstance(excluded, str) else rf"(.*\.)?{pattern(excluded)}" if excluded else ""
        settings.exclude_modules = "|".join(part for part in (first, pattern(saved)) if part)
        settings.modules_to_save = None
    if device.type != "meta":  # computed before training changes the modules to save
        setattr(model, _BASE, base_fingerprint(model))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)
    kept = cast("LoraConfig", model.peft_config[ADAPTER])
    kept.modules_to_save, kept.exclude_modules = saved, excluded
    for name in _trained_modules(model):
        model.get_submodule(name).requires_grad_(True)


def _trained_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of the modules that are trained whole together with the adapter."""
    settings = cast("LoraConfig", model.peft_config[ADAPTER])
    return [*(settings.modules_to_save or ()), *["score"] * hasattr(model, "score")]


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(_adapted(model))


def base_fingerprint(model: PreTrainedModel) -> str:
    """Returns a hash of the backbone under an adapter, from the first entries of every weight; training all weights
    would change most of these. The hash does not depend on whether the weights are in float32 or bfloat16, but it is
    different for 4-bit weights. Heads are left out, so that a causal LM and a reward model can have the same base."""
    digest = hashlib.sha256()
    for start in beginnings((weight for _, weight in _own(cast(Module, model.base_model))), 64):
        digest.update(start.bfloat16().float().numpy().tobytes())
    return digest.hexdigest()[:32]


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the frozen reference: the model without its adapter or, if it has none, a copy of the model as it is now.

    The weights under an adapter are shared with `model`, not copied; a score head, which is trained, is copied.
    """
    frozen = _copy(model, frozen_tensors(model) if has_adapter(model) else {})
    _drop_adapter(frozen)
    return frozen.requires_grad_(False).eval()


def shared_view(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model that shares its frozen tensors; trained tensors (an adapter, a score head) are
    copied. Activation checkpointing is off in the copy."""
    return _copy(model, frozen_tensors(model))


def _copy(model: PreTrainedModel, memo: dict[int, Tensor]) -> PreTrainedModel:
    copied = copy.deepcopy(model, memo)
    disable_activation_checkpointing(copied)
    return copied


def frozen_tensors(model: Module) -> dict[int, Tensor]:
    """Returns the frozen weights and the buffers by id, as a memo for copy.deepcopy, which then does not copy them."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad}


def merged_copy(
    model: PreTrainedModel, dtype: torch.dtype | None = None, named: Iterable[tuple[str, Tensor]] | None = None
) -> PreTrainedModel:
    """Returns the plain model with the adapter merged into the weights, or with the weights `named`. The copy shares no
    memory with `model` and is on the CPU, because GPU memory is scarce. Its dtype is `dtype` or, if that is None, the
    dtype of each weight."""
    named = plain_weights(model, dtype) if named is None else named
    weights = {name: weight.to("cpu", copy=True).contiguous() for name, weight in named}
    plain = shared_view(model)
    _drop_adapter(plain)
    make_plain(plain)
    plain.load_state_dict(weights, strict=False, assign=True)  # not strict, because tied weights occur only once
    plain.tie_weights()
    if dtype:
        plain.config.dtype = dtype
    return plain.to("cpu").requires_grad_(True)  # pyright: ignore[reportArgumentType] (as in loading._ready)


def share_weights(one: Module, other: Module) -> bool:
    """Returns whether two models share a weight, so that merging an adapter into one changes the other. Sharded models
    do not share weights in this sense; they share the memory of their parts (`sharding.shard`, `sharding.assign`)."""
    return bool({id(weight) for weight in one.parameters()} & {id(weight) for weight in other.parameters()})


def merge_adapter(model: PreTrainedModel) -> None:
    """Merges the adapter into the weights in place, which leaves the plain model. A model without an adapter is
    unchanged.

    Weights that other models share change as well, except in a sharded model. Use it only for float32 weights: bfloat16
    would lose most of the update to rounding, and 4-bit weights cannot hold it (see `merged_copy`).
    """
    if layers := _adapted(model):
        for _, _, layer in layers:
            if is_sharded(model):
                assign(layer.get_base_layer(), {_parameter(layer): _merged(layer, _base_weight(layer))})
            else:
                layer.merge(safe_merge=True)
        _drop_adapter(model)
        model.requires_grad_(True)


@torch.no_grad()
def plain_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the weights of the plain model with the merged adapter, one at a time.

    The sum is computed in float32 and returned in `dtype`, or in the dtype of the weight (for 4-bit weights, the dtype
    in which they were loaded).
    """
    layers = {id(_base_weight(layer)): layer for _, _, layer in _adapted(model)}
    for name, parameter in _own(model):
        layer, weight = layers.get(id(parameter)), plain_weight(whole_weight(parameter))
        given = dtype or weight.dtype
        if layer is not None:
            weight = _merged(layer, weight.float())
        yield re.sub(r"(\.base_layer)+\.", ".", name), weight.detach().to(given)


@torch.no_grad()
def weighted_weights(
    models: Sequence[PreTrainedModel], factors: Sequence[float], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the weights of a plain model to which the updates of several adapters are added, each
    times its factor. The models share their base weights. The sum is computed in float32 and returned in `dtype`.

    Raises ValueError if an adapter is a DoRA or was trained together with whole modules, whose weights are not a sum,
    unless it is the only one and its factor is 1.
    """
    if list(factors) == [1]:
        yield from plain_weights(models[0], dtype)
        return
    for model in models:
        if whole := _trained_modules(model):
            told = f"adapters: one was trained together with all of {', '.join(whole)}"
            raise ValueError(f"{told}; merge it by itself, without a factor")
        if any(cast(Any, layer).lora_variant.get(ADAPTER) is not None for _, _, layer in _adapted(model)):
            raise ValueError("adapters: one is a DoRA, whose update is not a sum; merge it by itself, without a factor")
    layers = [{id(_base_weight(layer)): layer for _, _, layer in _adapted(model)} for model in models]
    for name, parameter in _own(models[0]):
        total = plain_weight(parameter).float()
        for factor, own in zip(factors, layers, strict=True):
            if (layer := own.get(id(parameter))) is not None:
                total = total + factor * _update(layer, torch.float32)
        yield re.sub(r"(\.base_layer)+\.", ".", name), total.detach().to(dtype)


@torch.no_grad()
def _merged(layer: Any, weight: Tensor) -> Tensor:
    """Returns the weight of a layer with its adapter merged, computed in the dtype of `weight`."""
    update, variant = _update(layer, weight.dtype), layer.lora_variant.get(ADAPTER)
    if variant is None:
        return weight + update
    layer.get_delta_weight = lambda adapter: update  # DoRA asks the layer for its update
    try:
        return variant.merge_safe(layer, ADAPTER, weight)
    finally:
        del layer.get_delta_weight


def _update(layer: Any, dtype: torch.dtype) -> Tensor:
    """Returns the update that an adapter adds to the weight of its layer, in `dtype`. peft's `get_delta_weight` is not
    used, because it rounds the product to the dtype of the matrices or of the weight."""
    a, b = (matrices[ADAPTER].weight.to(dtype) for matrices in (layer.lora_A, layer.lora_B))
    if (experts := getattr(layer, "num_experts", 1)) > 1:  # fused experts, whose weight is a single parameter
        a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)
        order = "e o i" if layer._did_swap_in_out_features else "e i o"
        return torch.einsum(f"o r e, e r i -> {order}", b, a) * layer.scaling[ADAPTER]
    product = b @ a
    return (product.T if getattr(layer, "fan_in_fan_out", False) else product) * layer.scaling[ADAPTER]


def holds_merged_adapter(source: str) -> bool:
    """Returns whether the folder of a run holds weights to which its adapter was added, in float32."""
    return (Path(source) / "adapter" / "adapter_config.json").exists()


def warn_if_rounded(source: str, dtype: str, field: str) -> None:
    """Logs a warning if the folder of a run holds merged weights and `dtype` is not float32, so that they are
    rounded."""
    if dtype != "float32" and holds_merged_adapter(source):
        log.warning(
            "%s: %s holds weights with a merged adapter; %s loses a part of what the adapter learned by rounding: use "
            "dtype float32",
            *(field, source, dtype),
        )


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the adapter and the modules trained together with it to `folder`, in peft's format. The metadata of the
    file hold a fingerprint of the base weights and whether these were in 4 bits. Every rank must call it; rank 0
    writes."""
    from safetensors.torch import save_file

    settings = cast("LoraConfig", copy.deepcopy(model.peft_config[ADAPTER]))
    settings.modules_to_save = _trained_modules(model) or None
    weights = {name: weight.contiguous() for name, weight in on_first_rank(adapter_weights(model)).items()}
    for name in sorted(weights):  # a safetensors file cannot hold tied tensors
        if any(weights[name].data_ptr() == weights[other].data_ptr() for other in weights if other < name):
            weights[name] = weights[name].clone()
    base = {"base": getattr(model, _BASE), "load_in_4bit": "true" if is_four_bit(model) else "false"}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"} | base)
        settings.save_pretrained(str(folder))

    on_first(write)


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the tensors of the adapter and of the modules trained together with it, under the names that a PeftModel
    around the plain model has for them. A weight that several of these modules share occurs under each name, because
    peft copies each module."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in _trained_modules(model):
        for part, weight in model.get_submodule(name).named_parameters():
            own[f"{name}.{part}"] = weight.detach()
    return {f"base_model.model.{name}": weight for name, weight in own.items()}


def _own(model: Module) -> list[tuple[str, Tensor]]:
    """Returns the parameters of the model, without those of the adapter, by their current names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" not in name]


def _parameter(layer: Any) -> str:
    """Returns the name of the adapted parameter in the base layer."""
    return getattr(layer, "parameter_name", "weight")


def _base_weight(layer: Any) -> Tensor:
    return getattr(layer.get_base_layer(), _parameter(layer))


def _drop_adapter(model: PreTrainedModel) -> None:
    for parent, name, layer in _adapted(model):
        setattr(parent, name, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def _adapted(model: Module) -> list[tuple[Module, str, BaseTunerLayer]]:
    """Returns (parent module, name in the parent, layer) for every layer with an adapter."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (parent, name, layer)
        for parent in list(model.modules())
        for name, layer in list(parent.named_children())
        if isinstance(layer, BaseTunerLayer)
    ]
