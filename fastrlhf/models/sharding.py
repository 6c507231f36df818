"""Weights, gradients and moments spread over the processes of a run: FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv
2304.11277, is its predecessor).

Each layer is a group that is gathered before its forward and its backward and given back after. The remaining weights
(embeddings, last norm, head) belong to the root group and stay gathered from the forward to the end of the backward, or
to `give_back` where there is none, so that losses can read the weight of the head as in one process. At other times a
parameter is a DTensor of which this rank holds a part. Frozen models are spread in the same way.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastrlhf.distributed.ranks import apart, compare, from_all, is_first, world_size

_WHOLE = "fastrlhf_whole"  # attribute of a sharded model within `whole`


def shard(*models: PreTrainedModel) -> None:
    """Spreads models that every rank holds over all of them, in place; in one process nothing happens.

    After their copies are made, and before their optimiser. Raises ValueError, on every rank, where a rank has read
    other weights (a hash of samples of every tensor). A loss is a sum over ranks, divided by a count of the whole
    step, so gradients are summed, in float32, and not averaged. From now on all ranks make equally many passes, except
    within `whole`. Models that share frozen weights still share them when sharded, except parts that are smaller than
    those of the first rank.
    """
    if world_size() == 1:
        return
    # The last part of the path: hosts may keep the same model in different places.
    sources = [Path(model.name_or_path or "").name or "scratch" for model in models]
    names = [f"model {i} ({type(models[i]).__name__} from {source})" for i, source in enumerate(sources)]
    compare({f"model {i}": name for i, name in enumerate(names)}, "source")
    compare({name: weight_sample(model) for name, model in zip(names, models, strict=True)}, "starting weights")
    first: dict[int, tuple[PreTrainedModel, str]] = {}
    shared: dict[PreTrainedModel, dict[str, tuple[PreTrainedModel, str]]] = defaultdict(dict)
    for model in models:
        for name, parameter in model.named_parameters():
            owner, own_name = first.setdefault(id(parameter), (model, name))
            if owner is not model:
                shared[model][name] = owner, own_name
    for model in models:
        _shard(model)
    for model, owners in shared.items():
        assign(model, {name: owner.get_parameter(own_name) for name, (owner, own_name) in owners.items()})


def _shard(model: PreTrainedModel) -> None:
    mesh = init_device_mesh(model.device.type, (world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers = _layers(model.base_model)
    # A group has one dtype, and a score head is float32 under any backbone.
    heads = [model.score] if hasattr(model, "score") else []
    for module in [*layers, *heads]:
        fully_shard(cast(Module, module), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for group in _groups(model):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo supports only sums
    model.run_backbone = MethodType(_run_backbone, model)  # pyright: ignore[reportArgumentType] (modules keep methods too)
    register_fsdp_forward_method(model, "run_backbone")


def _layers(module: Module) -> list[Module]:
    """The layers of a backbone, at any depth; layers within layers are not listed. Families without transformers' layer
    class: the modules in its direct lists."""
    found: list[str] = []
    for name, part in module.named_modules():  # parents first
        if isinstance(part, GradientCheckpointingLayer) and not any(name.startswith(f"{each}.") for each in found):
            found.append(name)
    layers = [module.get_submodule(name) for name in found]
    return layers or [layer for child in module.children() if isinstance(child, ModuleList) for layer in child]


def backbone_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The callable that computes the hidden states: `model.base_model`, or for a sharded model a method that gathers
    its weights first."""
    return cast(Callable[..., Any], model.run_backbone) if isinstance(model, FSDPModule) else _backbone(model)


@contextmanager
def whole(model: PreTrainedModel) -> Iterator[None]:
    """Context in which every rank holds all weights and may run the model without gradients any number of times, for
    example to sample or evaluate, independently of the number of passes on other ranks."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    for group in _groups(model):
        group.unshard()
    setattr(model, _WHOLE, True)
    try:
        with apart():
            yield
    finally:
        delattr(model, _WHOLE)
        for group in _groups(model):
            group.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


@torch.no_grad()
def weight_sample(model: Module, length: int = 64) -> str:
    """A hash of at most `length` entries of every tensor of a model that is not sharded yet, evenly spread over it."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // length) or 1].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.ndim and len(sample) else b"")
    return digest.hexdigest()[:16]


def runs_in_step(model: PreTrainedModel) -> bool:
    """Whether every rank has to make equally many passes through the model, because each pass gathers its weights."""
    return isinstance(model, FSDPModule) and not hasattr(model, _WHOLE)


def give_back(model: PreTrainedModel) -> None:
    """Frees the weights that the root of a model without a backward would keep after its passes."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this rank may hold a part; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> Tensor:
    """The part that this rank holds; of a tensor that every rank holds whole, all on the first and none elsewhere."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor if is_first() else tensor.new_empty(0)


def beginnings(tensors: Iterable[Tensor], length: int) -> list[Tensor]:
    """The first `length` entries of each, or all that it has, flat, in float32 on the CPU; nothing else is gathered.
    Every rank must call it."""
    # Copies, because a view would be sent with its whole storage.
    own = [held(tensor.detach()).reshape(-1)[:length].float().cpu().clone() for tensor in tensors]
    return [torch.cat(parts)[:length] for parts in zip(*from_all(own), strict=True)]


def on_first_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole and on the CPU on the first rank, and none elsewhere; in one process as they are."""
    if world_size() == 1:
        return dict(tensors)
    every = ((name, full(tensor)) for name, tensor in tensors.items())  # one at a time
    return {name: tensor.cpu() for name, tensor in every if is_first()}


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters and persistent buffers of a model by name, tied ones once, as `on_first_rank` has them."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in model.named_parameters()}
    return on_first_rank({name: tensor for name, tensor in model.state_dict().items() if name not in tied})


def is_sharded(what: Module | Tensor) -> bool:
    return isinstance(what, FSDPModule | DTensor)


def assign(module: Module, weights: Mapping[str, Tensor]) -> None:
    """Gives a sharded module, or a part of one, other sharded weights, by name. The tensors of the old ones, which
    other models may share, stay as they are."""
    named: Mapping[str, Any] = dict(module.named_parameters())
    new = {
        name: cast(DTensor, weight).redistribute(placements=named[name].placements).detach()
        for name, weight in weights.items()
    }
    module.load_state_dict(new, strict=False, assign=True)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, a whole tensor that every rank holds, in the layout of `tensor`: on its device and, if that is sharded,
    the part of this rank. A `value` that is already sharded is returned unchanged."""
    if isinstance(value, DTensor):
        return value if isinstance(tensor, DTensor) else full(value)
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, over the same memory; the tensor itself if it is not sharded."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def part_size(tensor: Tensor) -> int:
    """Number of entries that a full part of it has; the last ranks may hold fewer."""
    if not isinstance(tensor, DTensor):
        return tensor.numel()
    return -(-len(tensor) // world_size()) * (tensor.numel() // len(tensor))


def first_entry(tensor: Tensor) -> int:
    """Index, among all entries of a tensor, of the first entry of this rank."""
    rank = tensor.device_mesh.get_local_rank() if isinstance(tensor, DTensor) else 0
    return min(rank * part_size(tensor), tensor.numel())


def of_parts(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor sharded like `tensor`, of which this rank holds `own`; `own` itself if `tensor` is not sharded."""
    if not isinstance(tensor, DTensor):
        return own
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def _run_backbone(model: PreTrainedModel, **inputs: Any) -> Any:
    return _backbone(model)(**inputs)


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    """`base_model`, which is the model itself if the prefix that its class declares is not the name of its backbone."""
    if (base := model.base_model) is not model:
        return cast(PreTrainedModel, base)
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def _groups(model: Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
