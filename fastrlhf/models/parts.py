"""Loads weights of which each rank keeps only its part, so that no rank ever holds a whole model.

transformers reads the files, renames and converts tensors one at a time, and passes each finished weight on. Here every
rank keeps its rows of the weight on its device and drops the rest. Until the model is sharded (models/sharding.py), the
module has a `Part` in place of the weight: a parameter with shape, dtype and device of the whole weight and without
memory, whose entries are all NaN. Structural changes, such as adapters and copies of the model, are made in this state.
A pass needs a sharded copy of the model (`sharding.runnable`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import core_model_loading, modeling_utils

from fastrlhf.distributed.ranks import from_all, gathered, rank, world_size

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # the variable with which transformers reads one tensor at a time

_EQUAL = "_tied_params_are_equal"  # transformers' function that decides whether two saved weights may be tied

LENGTH = 64
"""Number of entries of a weight that every rank keeps, from which ranks compare their weights."""


class Part(Parameter):
    """A parameter of which this rank holds only its rows. Its own entries are NaN and take no memory."""

    rows: Tensor
    """This rank's rows, in the division that FSDP2 makes."""
    sample: Tensor
    """At most LENGTH evenly spaced entries of the whole weight, on the CPU."""

    @classmethod
    def of(cls, rows: Tensor, sample: Tensor, shape: torch.Size, requires_grad: bool = True) -> Part:
        empty = torch.full((), float("nan"), dtype=rows.dtype, device=rows.device).expand(shape)
        made = torch.Tensor._make_subclass(cls, empty, requires_grad)
        made.rows, made.sample = rows, sample
        made._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] (transformers reads it)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        if id(self) not in memo:
            memo[id(self)] = Part.of(self.rows.clone(), self.sample, self.shape, self.requires_grad)
        return memo[id(self)]

    def whole(self) -> Tensor:
        """Gathers the whole weight. Every rank must call it."""
        return gathered(self.rows)


def in_parts(model: Module) -> bool:
    """Returns whether this rank holds only its part of some weights of a model that is not sharded yet."""
    return any(isinstance(parameter, Part) for parameter in model.parameters())


def whole_weight(weight: Tensor) -> Tensor:
    """Returns the weight, gathered if it is a Part. Every rank must call it."""
    return weight.whole() if isinstance(weight, Part) else weight


def sample_of(weight: Tensor, length: int = LENGTH) -> Tensor:
    """Returns at most `length` evenly spaced entries of a weight, on the CPU."""
    if isinstance(weight, Part):
        return weight.sample
    flat = weight.detach().reshape(-1)
    return flat[:: -(-flat.numel() // length) or 1].clone().cpu()


@torch.no_grad()
def make_whole(module: Module) -> None:
    """Gathers the weights of a module itself, so that its class can change them. Every rank must call it."""
    for name, weight in list(module.named_parameters(recurse=False)):
        if isinstance(weight, Part):
            module._parameters[name] = Parameter(weight.whole(), weight.requires_grad)


@contextmanager
def loading_parts(device: torch.device | str) -> Iterator[None]:
    """Context in which transformers loads only this rank's part of every weight, to `device`. Score heads and single
    numbers are loaded whole. In one process, and with versions of transformers that have no `_EQUAL`, nothing
    changes."""
    transformers: Any = modeling_utils
    are_equal = getattr(transformers, _EQUAL, None)
    if world_size() == 1 or are_equal is None:  # older versions of transformers compare tied weights elsewhere
        yield
        return
    set_whole = core_model_loading.set_param_for_module

    def set_part(model: Module, target_name: str, *arguments: Any, **keywords: Any) -> None:
        set_whole(model, target_name, *arguments, **keywords)  # pyright: ignore[reportArgumentType]
        owner, _, name = target_name.rpartition(".")
        module = model.get_submodule(owner)
        weight = module._parameters.get(name)
        known = weight is not None and weight.ndim and weight.device.type != "meta" and weight.is_floating_point()
        if weight is not None and known and owner.rpartition(".")[2] != "score":
            module._parameters[name] = _cut(weight, torch.device(device))

    def parts_are_equal(one: Tensor, other: Tensor) -> bool:
        if not isinstance(one, Part) or not isinstance(other, Part):
            return are_equal(one, other)
        return all(from_all(one.shape == other.shape and torch.equal(one.rows, other.rows)))

    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"  # threads would read many tensors ahead
    core_model_loading.set_param_for_module = set_part
    setattr(transformers, _EQUAL, parts_are_equal)
    try:
        yield
    finally:
        os.environ.pop(_NO_THREADS)
        if before is not None:
            os.environ[_NO_THREADS] = before
        core_model_loading.set_param_for_module = set_whole
        setattr(transformers, _EQUAL, are_equal)


def _cut(weight: Parameter, device: torch.device) -> Part:
    size = -(-len(weight) // world_size())
    rows = weight.detach()[rank() * size : (rank() + 1) * size]
    own = torch.empty(rows.shape, dtype=rows.dtype, device=device).copy_(rows)
    return Part.of(own, sample_of(weight), weight.shape, weight.requires_grad)
