"""Shards weights, gradients and moments over the processes of a run by FSDP2 (`fully_shard`, the successor of FSDP,
Zhao et al. 2023, arXiv 2304.11277).

Each layer is a group that is gathered before its forward and its backward pass and freed afterwards. The remaining
weights (embeddings, last norm, head) belong to the root group. They stay gathered from the forward pass to the end of
the backward pass, or to `give_back` if there is no backward pass, so that losses can read the weight of the head as in
one process. At all other times a parameter is a DTensor of which this rank holds a part. Frozen models are sharded in
the same way.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, ModuleList, Parameter
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastrlhf.distributed.ranks import apart, compare, from_all, is_first, world_size
from fastrlhf.models.own_pace import announced, gathered_outside_layers, own_pace_of
from fastrlhf.models.parts import Part, in_parts, sample_of, whole_weight

_WHOLE = "fastrlhf_whole"  # attribute of a sharded model of which every rank holds all weights (`own_pace`)


def shard(*models: PreTrainedModel) -> None:
    """Shards models over all ranks, in place. Before, every rank must hold whole weights or its parts of them
    (models/parts.py). In one process nothing happens.

    It must be called after the models have been copied and before their optimisers are made. Raises ValueError, on
    every rank, if a rank has loaded other weights (compared by a hash of samples of every tensor). A loss is a sum over
    ranks divided by a count of the whole step, so gradients are summed in float32 and not averaged. From then on all
    ranks must make equally many passes, except within `own_pace`. Frozen weights that models share are still shared
    after sharding, except on ranks whose part is smaller than that of the first rank.
    """
    if world_size() == 1:
        return
    # Only the last part of a path is compared, because hosts may keep a model in different places.
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
    parts = _without_parts(model)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers = _layers(model.base_model)
    # A group has one dtype, and a score head is always float32.
    heads = [model.score] if hasattr(model, "score") else []
    for module in [*layers, *heads]:
        fully_shard(cast(Module, module), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    _place_parts(model, parts)
    type(model).__name__ = plain_class(model).__name__  # messages name the class of transformers
    for group in _groups(model):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo only supports sums
    model.run_backbone = MethodType(_run_backbone, model)  # pyright: ignore[reportArgumentType] (modules keep methods too)
    register_fsdp_forward_method(model, "run_backbone")


def _without_parts(model: PreTrainedModel) -> dict[str, Part]:
    """Replaces every Part by a parameter on the meta device, so that `fully_shard` allocates no memory for it. Returns
    the parts by name; tied ones occur under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    parts = {name: weight for name, weight in named if isinstance(weight, Part)}
    new: dict[int, Parameter] = {}
    for name, part in parts.items():
        owner, _, key = name.rpartition(".")
        empty = torch.empty(part.shape, dtype=part.dtype, device="meta")
        model.get_submodule(owner)._parameters[key] = new.setdefault(id(part), Parameter(empty, part.requires_grad))
    return parts


def _place_parts(model: PreTrainedModel, parts: Mapping[str, Part]) -> None:
    """Makes the rows of the parts the weights of this rank in a sharded model, without a copy."""
    placed: dict[int, Parameter] = {}
    for name, part in parts.items():
        owner, _, key = name.rpartition(".")
        module, spec = model.get_submodule(owner), cast(DTensor, model.get_parameter(name))
        if id(part) not in placed:
            stride = torch.empty(part.shape, device="meta").stride()
            local = DTensor.from_local(
                part.rows, spec.device_mesh, spec.placements, run_check=False, shape=part.shape, stride=stride
            )
            placed[id(part)] = Parameter(local, part.requires_grad)
        module._parameters[key] = placed[id(part)]


@contextmanager
def runnable(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Context that yields a model that can make passes before the model itself is sharded: the model itself or, if this
    rank holds only parts of its weights, a sharded copy over the same parts. All ranks must make equally many passes
    through it. Attributes that are set on the copy are not set on the model."""
    if not in_parts(model):
        yield model
        return
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        if isinstance(weight, Part):
            memo[id(weight)] = Part.of(weight.rows, weight.sample, weight.shape, weight.requires_grad)
        else:
            memo[id(weight)] = Parameter(weight.detach(), weight.requires_grad)
    memo[id(model.config)] = model.config
    trial = copy.deepcopy(model, memo)
    _shard(trial)
    yield trial


def regather(model: PreTrainedModel) -> None:
    """Gathers the weights outside the layers of a sharded model again after a backward pass, which frees them."""
    if isinstance(model, FSDPModule):
        model.unshard()


def _layers(module: Module) -> list[Module]:
    """Returns the layers of a backbone at any depth, but not layers within layers. If the family does not use
    transformers' layer class, returns the modules in the backbone's direct lists."""
    found: list[str] = []
    for name, part in module.named_modules():  # parents first
        if isinstance(part, GradientCheckpointingLayer) and not any(name.startswith(f"{each}.") for each in found):
            found.append(name)
    layers = [module.get_submodule(name) for name in found]
    return layers or [layer for child in module.children() if isinstance(child, ModuleList) for layer in child]


def backbone_of(model: PreTrainedModel) -> Callable[..., Any]:
    """Returns the callable that computes the hidden states: the backbone or, for a sharded model, a method that gathers
    its weights first."""
    return cast(Callable[..., Any], model.run_backbone) if isinstance(model, FSDPModule) else _backbone(model)


@contextmanager
def own_pace(*models: PreTrainedModel, gather: bool = False) -> Iterator[None]:
    """Context in which this rank may run the models without gradients any number of times, for example to sample or
    evaluate, even if other ranks make fewer or more passes. Every rank must enter it, with the same models. An error
    that a rank raises between two passes is raised on every rank at the end of the context.

    `gather`: every rank holds all weights in the context. Otherwise it holds one layer at a time, besides the weights
    outside the layers (see models/own_pace.py).
    """
    sharded = [model for model in models if isinstance(model, FSDPModule)]
    if not sharded:
        yield
    elif gather:
        with ExitStack() as stack:
            for model in sharded:
                stack.enter_context(_whole(model))
            with apart():
                yield
    else:
        with own_pace_of(sharded, _one_token):
            yield


@contextmanager
def _whole(model: FSDPModule) -> Iterator[None]:
    model.set_reshard_after_forward(False)
    for group in _groups(cast(Module, model)):
        group.unshard()
    setattr(model, _WHOLE, True)
    try:
        yield
    finally:
        delattr(model, _WHOLE)
        for group in _groups(cast(Module, model)):
            group.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


def _one_token(model: PreTrainedModel) -> None:
    """Runs a pass over one token, whose result is not used."""
    backbone_of(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


@torch.no_grad()
def weight_sample(model: Module, length: int = 64) -> str:
    """Returns a hash of at most `length` evenly spaced entries of every tensor of a model that is not sharded."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        sample = sample_of(tensor, length)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.ndim and len(sample) else b"")
    return digest.hexdigest()[:16]


def runs_in_step(model: PreTrainedModel) -> bool:
    """Returns whether all ranks must make equally many passes through the model, because each pass gathers its
    weights."""
    return isinstance(model, FSDPModule) and not hasattr(model, _WHOLE) and not gathered_outside_layers(model)


def give_back(model: PreTrainedModel) -> None:
    """Frees the gathered root weights of a model after passes without a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: Tensor) -> Tensor:
    """Returns the whole tensor, of which this rank may hold only a part. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else whole_weight(tensor)


def held(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds. A tensor that is not sharded belongs to the first rank; the
    others get an empty tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if isinstance(tensor, Part):
        return tensor.rows
    return tensor if is_first() else tensor.new_empty(0)


def beginnings(tensors: Iterable[Tensor], length: int) -> list[Tensor]:
    """Returns at most the first `length` entries of each tensor, flat, in float32 on the CPU; only these are gathered.
    Every rank must call it."""
    # Copies, because a view would be sent with its whole storage.
    own = [held(tensor).detach().reshape(-1)[:length].float().cpu().clone() for tensor in tensors]
    return [torch.cat(parts)[:length] for parts in zip(*from_all(own), strict=True)]


def on_first_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathers tensors to the CPU of the first rank, where it returns them whole; it returns an empty dict on other
    ranks. In one process the tensors are returned unchanged."""
    if world_size() == 1:
        return dict(tensors)
    every = ((name, full(tensor)) for name, tensor in tensors.items())  # gathered one at a time
    return {name: tensor.cpu() for name, tensor in every if is_first()}


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gathers all parameters and persistent buffers of a model by name, as `on_first_rank` does; tied ones occur
    once."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in model.named_parameters()}
    return on_first_rank({name: tensor for name, tensor in model.state_dict().items() if name not in tied})


def plain_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Returns the class of a model before it was sharded; FSDP2 replaces it by a class derived from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def is_sharded(what: Module | Tensor) -> bool:
    return isinstance(what, FSDPModule | DTensor)


def assign(module: Module, weights: Mapping[str, Tensor]) -> None:
    """Replaces weights of a sharded module, by name, by other sharded weights. The tensors of the old weights, which
    other models may share, are not changed."""
    named: Mapping[str, Any] = dict(module.named_parameters())
    new = {
        name: cast(DTensor, weight).redistribute(placements=named[name].placements).detach()
        for name, weight in weights.items()
    }
    module.load_state_dict(new, strict=False, assign=True)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Returns `value`, a whole tensor that every rank holds, in the layout of `tensor`: on its device and, if `tensor`
    is sharded, only the part of this rank. A sharded `value` is returned unchanged, or whole if `tensor` is not
    sharded."""
    if isinstance(value, DTensor):
        return value if isinstance(tensor, DTensor) else full(value)
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def part_size(tensor: Tensor) -> int:
    """Returns the number of entries of a full part of the tensor; the last ranks may hold fewer."""
    if not isinstance(tensor, DTensor):
        return tensor.numel()
    return -(-len(tensor) // world_size()) * (tensor.numel() // len(tensor))


def first_entry(tensor: Tensor) -> int:
    """Returns the index, among all entries of a tensor, of the first entry that this rank holds."""
    rank = tensor.device_mesh.get_local_rank() if isinstance(tensor, DTensor) else 0
    return min(rank * part_size(tensor), tensor.numel())


def of_parts(tensor: Tensor, own: Tensor) -> Tensor:
    """Returns a tensor sharded like `tensor`, of which this rank holds the part `own`; `own` itself if `tensor` is not
    sharded."""
    if not isinstance(tensor, DTensor):
        return own
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def _run_backbone(model: PreTrainedModel, **inputs: Any) -> Any:
    with announced(model):
        return _backbone(model)(**inputs)


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the backbone. `base_model` is not enough: it is the whole model if the prefix that the class declares is
    not the name of the backbone."""
    if (base := model.base_model) is not model:
        return cast(PreTrainedModel, base)
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def _groups(model: Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
