"""Offloads to CPU memory: frozen models while they are not used, and the inputs of layers between the forward and the
backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

HOST = torch.device("cpu")


class Waiting:
    """Frozen models that are in CPU memory except while they are used. Weights shared with models that stay on the
    device are not moved. Frozen weights never change, so they are copied to the CPU only once.
    """

    def __init__(self, frozen: Sequence[Module], staying: Sequence[Module], device: torch.device) -> None:
        stay = {id(weight) for model in staying for weight in model.parameters()}
        weights = {id(weight): weight for model in frozen for weight in model.parameters() if id(weight) not in stay}
        self._device, self._weights = device, list(weights.values())
        self._kept = [_on_host(weight.data, pinned=device.type == "cuda") for weight in self._weights]
        self._leave()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Context in which the models are on the device."""
        for weight, kept in zip(self._weights, self._kept, strict=True):
            weight.data = kept.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for weight, kept in zip(self._weights, self._kept, strict=True):
            weight.data = kept


def _on_host(weight: Tensor, *, pinned: bool) -> Tensor:
    """Copies a weight to the CPU, directly into pinned memory."""
    return torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)


Checkpoint = Callable[..., Any]
"""The signature of `torch.utils.checkpoint.checkpoint`: a function and its arguments."""


def check_offloading(device: torch.device) -> None:
    """Raises ValueError if the run is on a CPU, where offloading is pointless."""
    if device.type != "cuda":
        raise ValueError(f"activation_offloading: needs a CUDA GPU, and the run is on {device}; set it to false")


def offloaded(checkpoint: Checkpoint, place: torch.device = HOST) -> Checkpoint:
    """Wraps `checkpoint` for the layers of one model, so that the inputs that it keeps for the backward pass are stored
    on `place`.

    The hooks of `checkpoint` inside a layer take precedence over the hooks here, so only layer inputs are moved, and no
    weights. Without checkpointing a layer would keep tens of tensors of this size, more than can be copied while it is
    computed.
    """
    inputs = _LayerInputs(place)

    def offloading(function: Callable[..., Any], *arguments: Any) -> Any:
        with saved_tensors_hooks(inputs.leave, inputs.come_back):
            return checkpoint(function, *arguments)

    return offloading


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Input:
    """The object that the backward pass of a layer holds in place of the layer's input."""

    copy: Tensor
    device: torch.device
    before: weakref.ref[_Input] | None
    """The input that was offloaded before this one, which the backward pass needs next."""


class _LayerInputs:
    """Copies layer inputs on a separate stream, in parallel with the computation: an input is offloaded while its layer
    is computed, and fetched while the next layer is recomputed. The last input stays on the device, because it is
    needed first.

    Only one tensor is copied at a time, and it is kept until the computation has waited for the stream. Therefore the
    device holds at most one tensor that no layer uses, memory is freed in the order of the computation (without
    record_stream), and the host never waits.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._stream: Any = None
        self._last: weakref.ref[_Input] | None = None
        self._under_way: tuple[_Input, Tensor] | None = None

    def leave(self, tensor: Tensor) -> _Input | Tensor:
        """The pack hook: starts to copy the tensor as soon as all computation queued so far is done."""
        tensor = tensor.detach()
        if not tensor.numel():  # torch 2.11 also saves an empty tensor, on another device, with every input
            return tensor
        self._wait(tensor.device)
        copy = torch.empty_like(tensor, device=self._place, pin_memory=tensor.is_cuda)
        self._copy(tensor, copy, tensor.device)
        one = _Input(copy, tensor.device, self._last)
        self._under_way, self._last = (one, tensor), weakref.ref(one)
        return one

    def come_back(self, one: _Input | Tensor) -> Tensor:
        """The unpack hook: returns the tensor for all computation queued from now on."""
        if isinstance(one, Tensor):
            return one
        tensor = self._under_way[1] if self._under_way and self._under_way[0] is one else self._fetched(one)
        self._wait(one.device)
        before = one.before and one.before()
        if before is not None:
            self._under_way = before, self._fetched(before)
        return tensor

    def _fetched(self, one: _Input) -> Tensor:
        tensor = torch.empty_like(one.copy, device=one.device)
        self._copy(one.copy, tensor, one.device)
        return tensor

    def _copy(self, source: Tensor, target: Tensor, device: torch.device) -> None:
        streams = torch.get_device_module(device)
        self._stream = self._stream or streams.Stream()
        # The source may not be computed yet, and the memory of the target may still be in use.
        self._stream.wait_stream(streams.current_stream())
        with streams.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def _wait(self, device: torch.device) -> None:
        """Makes computation queued from now on wait for the current copy, and drops the reference to its tensor."""
        if self._stream:
            torch.get_device_module(device).current_stream().wait_stream(self._stream)
        self._under_way = None
