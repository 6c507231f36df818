"""LoRA (Hu et al. 2021, arXiv 2106.09685) and its kin, from peft, over a base that every role of a run shares.

An adapter is injected into the model: it stays the class it was, its trunk stays `model.base_model`, and only the
adapter's weights (and a score head) have gradients. The reference is the same model without the adapter: another set of
modules around the very same tensors, so that it costs no memory and nothing is switched on and off.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.config import TrainConfig

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> None:
    """Freezes the model and injects an adapter with the `lora_` keys of `config`, drawn with its seed; a `score` head
    stays trainable. Until the first step the model's numbers are those it had.

    Raises ValueError where no module of the model fits `lora_target_modules`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = config.lora_target_modules
    settings = LoraConfig(
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=["score"] if hasattr(model, "score") else None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        base_model_name_or_path=config.model_name_or_path,
    )
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as error:
            fit = f"{', '.join(targets)} fit no layer of {type(model).__name__}"
            raise ValueError(f"lora_target_modules: {fit}") from error
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(_adapted(model))


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model before its adapter, for nobody to train: the reference. Without one, a copy of the model as it is now.

    The weights under an adapter are shared with `model`, not copied; a score head, which is trained, is copied.
    """
    shared = {}
    if has_adapter(model):
        shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    frozen = copy.deepcopy(model, shared)
    for parent, name, layer in _adapted(frozen):
        setattr(parent, name, layer.get_base_layer())
    return frozen.requires_grad_(False).eval()


def merge_adapter(model: PreTrainedModel) -> None:
    """Adds the adapter to the weights and leaves the plain model, in place; nothing happens where there is none.

    Shared weights change with it: the reference of the run is no longer one afterwards. In bfloat16 the sum is rounded.
    """
    if layers := _adapted(model):
        for parent, name, layer in layers:
            layer.merge(safe_merge=True)
            setattr(parent, name, layer.get_base_layer())
        model.requires_grad_(True)


@torch.no_grad()
def plain_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights that the plain model would have with the adapter added, one at a time: what another
    engine samples with. Not for DoRA."""
    layers = {id(layer.get_base_layer().weight): layer for _, _, layer in _adapted(model)}
    for name, weight in model.named_parameters():
        if ".lora_" not in name:
            layer = layers.get(id(weight))
            added = weight
            if layer is not None:
                added = weight + layer.get_delta_weight("default").to(weight.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            yield name.replace(".base_layer.", "."), added.detach()


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the adapter alone, in peft's form, into `folder`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = model.peft_config["default"]
    folder.mkdir(parents=True, exist_ok=True)
    # The names that a PeftModel around the plain model would give.
    weights = {f"base_model.model.{name}": w.contiguous() for name, w in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter_model.safetensors")
    settings.save_pretrained(folder)


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
