"""LoRA (Hu et al. 2021, arXiv 2106.09685) and its kin, from peft, over a base that every role of a run shares.

An adapter is injected into the model: it stays the class it was, its backbone stays `model.base_model`, and only the
adapter's weights (and a score head) have gradients. The reference is the same model without the adapter: another set of
modules around the very same tensors, so that it costs no memory and nothing is switched on and off. `roles.py` hangs
the other models of a run on the same tensors.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from fastrlhf.config import TrainConfig
from fastrlhf.distributed.ranks import on_first
from fastrlhf.models.forward import disable_activation_checkpointing
from fastrlhf.models.four_bit import is_four_bit, make_plain, plain_weight
from fastrlhf.models.sharding import assign, beginnings, is_sharded, on_first_rank

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "default"
"""What peft calls the one adapter of a model."""
SCORE = "base_model.model.score.weight"
"""The name of a score head's weight in the file of an adapter."""


def add_adapter(model: PreTrainedModel, config: TrainConfig, base: str) -> None:
    """Freezes the model and injects an adapter with the `lora_` keys of `config`, drawn with its seed; a `score` head
    stays trainable. Until the first step the model's numbers are those it had. `base` is where it was loaded from.

    Raises ValueError where no module of the model fits `lora_target_modules`, and for embeddings and heads, whose
    weights are read without their module.
    """
    from peft import LoraConfig

    targets = config.lora_target_modules
    settings = LoraConfig(
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=["score"] if hasattr(model, "score") else None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        base_model_name_or_path=base,
    )
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    apart = [module.weight for module in outer if module is not None]
    try:
        inject(settings, model, config.seed)
    except ValueError as error:
        fit = f"{', '.join(targets)} fit no layer of {type(model).__name__}"
        raise ValueError(f"lora_target_modules: {fit}: {error}") from error
    for _, name, layer in _adapted(model):
        if any(layer.get_base_layer().weight is weight for weight in apart):
            raise ValueError(f"lora_target_modules: {name} is an embedding or a head; name layers of the backbone")
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)


def inject(settings: LoraConfig, model: PreTrainedModel, seed: int) -> None:
    """Freezes the model and gives it an adapter, drawn with `seed`."""
    from peft import inject_adapter_in_model

    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(_adapted(model))


def base_fingerprint(model: PreTrainedModel) -> str:
    """Of the backbone under an adapter, the same in float32 and bfloat16: of the first entries of every weight, as any
    training moves most; in 4 bits it is another. A head is not part of it, so that a causal LM and a reward model may
    have one base."""
    digest = hashlib.sha256()
    named = cast(Module, model.base_model).named_parameters()
    for start in beginnings((weight for name, weight in named if ".lora_" not in name), 64):
        digest.update(start.bfloat16().float().numpy().tobytes())
    return digest.hexdigest()[:32]


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model before its adapter, for nobody to train: the reference. Without one, a copy of the model as it is now.

    The weights under an adapter are shared with `model`, not copied; a score head, which is trained, is copied.
    """
    frozen = _copy(model, frozen_tensors(model) if has_adapter(model) else {})
    _drop_adapter(frozen)
    return frozen.requires_grad_(False).eval()


def shared_view(model: PreTrainedModel) -> PreTrainedModel:
    """Other modules around the same tensors; what is trained (an adapter, a score head) is copied. Without activation
    checkpointing."""
    return _copy(model, frozen_tensors(model))


def _copy(model: PreTrainedModel, memo: dict[int, Tensor]) -> PreTrainedModel:
    copied = copy.deepcopy(model, memo)
    disable_activation_checkpointing(copied)
    return copied


def frozen_tensors(model: Module) -> dict[int, Tensor]:
    """By id, as deepcopy's memo wants them: the weights that nobody trains, and the buffers."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad}


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model with the adapter added to the weights, which shares nothing with `model`. It is made on the CPU,
    for want of room on the GPU."""
    weights = {name: weight.to("cpu", copy=True).contiguous() for name, weight in plain_weights(model)}
    plain = shared_view(model)
    _drop_adapter(plain)
    make_plain(plain)
    plain.load_state_dict(weights, strict=False, assign=True)  # not strict: of tied weights there is one
    plain.tie_weights()
    return plain.to("cpu").requires_grad_(True)  # pyright: ignore[reportArgumentType] (as in loading._ready)


def share_weights(one: Module, other: Module) -> bool:
    """Whether the two have a weight in common, which an adapter that is added to the one changes for the other. Sharded
    models have none: what they share is the memory of their parts (`sharding.shard`, `sharding.assign`)."""
    return bool({id(weight) for weight in one.parameters()} & {id(weight) for weight in other.parameters()})


def merge_adapter(model: PreTrainedModel) -> None:
    """Adds the adapter to the weights and leaves the plain model, in place; nothing happens where there is none.

    Shared weights change with it, but for those of a sharded model: the reference of the run is no longer one
    afterwards. In bfloat16 the sum is rounded. Not for weights in 4 bits, which the sum does not fit into:
    `merged_copy`.
    """
    if layers := _adapted(model):
        for _, _, layer in layers:
            if is_sharded(model):
                base = cast(Linear, layer.get_base_layer())
                assign(base, {"weight": _merged(layer, base.weight)})
            else:
                layer.merge(safe_merge=True)
        _drop_adapter(model)
        model.requires_grad_(True)


@torch.no_grad()
def plain_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights that the plain model would have with the adapter added, one at a time: what another
    engine samples with. Weights in 4 bits come in the dtype that they were loaded in."""
    layers = {id(layer.get_base_layer().weight): layer for _, _, layer in _adapted(model)}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            layer, weight = cast(Any, layers.get(id(parameter))), plain_weight(parameter)
            if layer is not None:
                weight = _merged(layer, weight)
            yield name.replace(".base_layer.", "."), weight.detach()


@torch.no_grad()
def _merged(layer: Any, weight: Tensor) -> Tensor:
    """The weight of a layer with its adapter added."""
    variant = layer.lora_variant.get(ADAPTER)  # DoRA
    if variant is None:
        return weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)
    return variant.merge_safe(layer, ADAPTER, weight)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the adapter alone, and a trained head, in peft's form, into `folder`; the metadata of the file say over
    which weights it was trained, and whether they were in 4 bits. Every rank must ask; the first one writes."""
    from safetensors.torch import save_file

    settings = cast("LoraConfig", copy.deepcopy(model.peft_config[ADAPTER]))
    if hasattr(model, "score"):
        settings.modules_to_save = ["score"]
    weights = {name: weight.contiguous() for name, weight in on_first_rank(adapter_weights(model)).items()}
    base = {"base": base_fingerprint(model), "load_in_4bit": "true" if is_four_bit(model) else "false"}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"} | base)
        settings.save_pretrained(str(folder))

    on_first(write)


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors themselves, and those of a score head, by the names that a PeftModel around the plain model gives."""
    from peft import get_peft_model_state_dict

    weights = {f"base_model.model.{name}": weight for name, weight in get_peft_model_state_dict(model).items()}
    if hasattr(model, "score"):
        weights[SCORE] = cast(Linear, model.score).weight.detach()
    return weights


def _drop_adapter(model: PreTrainedModel) -> None:
    for parent, name, layer in _adapted(model):
        setattr(parent, name, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def _adapted(model: Module) -> list[tuple[Module, str, BaseTunerLayer]]:
    """(parent, name in it, layer) of every layer with an adapter."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (parent, name, layer)
        for parent in list(model.modules())
        for name, layer in list(parent.named_children())
        if isinstance(layer, BaseTunerLayer)
    ]
