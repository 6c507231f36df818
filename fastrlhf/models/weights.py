"""The weights of a model by name, as checkpoints and saved models have them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.sharding import full, like


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is trained, and persistent buffers, by name; tied weights once. Frozen ones are where they came from."""
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def all_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters, frozen ones too, and persistent buffers by name; tied ones once."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def fingerprint(models: Mapping[str, PreTrainedModel]) -> str:
    """A fingerprint of weights before training: of the first entries of every tensor, as any training moves most."""
    tensors = [
        full(tensor.detach()).reshape(-1)[:64].float() for model in models.values() for tensor in model.parameters()
    ]
    return hashlib.sha256(torch.cat(tensors).cpu().numpy().tobytes()).hexdigest() if tensors else ""


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no mapping)


@torch.no_grad()
def load_weights(model: PreTrainedModel, file: Path) -> None:
    """Into the tensors that are there, so that the optimiser still means them."""
    own = trained_weights(model)
    with safe_open(file, "pt") as content:
        for name in sorted(set(own) ^ set(content.keys())):
            raise ValueError(f"{str(file)!r} is of another model: {name} is in one of the two alone")
        for name, tensor in own.items():
            saved = content.get_tensor(name)
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise ValueError(
                    f"{str(file)!r} is of another model: {name} is {saved.dtype} {list(saved.shape)} there and "
                    f"{tensor.dtype} {list(tensor.shape)} here"
                )
            tensor.copy_(like(tensor, saved))
