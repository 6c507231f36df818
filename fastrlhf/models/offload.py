"""Offloading to CPU memory: frozen models while they are not used, and the inputs of
layers between forward and backward."""

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
    """The weights of frozen models, except those shared with models that stay on the device. They never change, so they
    are copied to the CPU once and never copied back.
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
    """Copies directly into pinned memory, without a second copy."""
    return torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)


Checkpoint = Callable[..., Any]
"""The signature of `torch.utils.checkpoint.checkpoint`: a function and its arguments."""


def check_offloading(device: torch.device) -> None:
    """Raises ValueError if the run is on a CPU, where offloading would copy from CPU memory to CPU memory."""
    if device.type != "cuda":
        raise ValueError(f"activation_offloading: needs a CUDA GPU, and the run is on {device}; set it to false")


def offloaded(checkpoint: Checkpoint, place: torch.device = HOST) -> Checkpoint:
    """`checkpoint` for the layers of one model, the inputs that it keeps for the backward waiting on `place`.

    A layer's own hooks hide what it computes from the ones here, so nothing else is moved, and no weight. Without
    checkpointing a layer keeps tens of tensors of that size, more than can be copied while it computes.
    """
    inputs = _LayerInputs(place)

    def offloading(function: Callable[..., Any], *arguments: Any) -> Any:
        with saved_tensors_hooks(inputs.leave, inputs.come_back):
            return checkpoint(function, *arguments)

    return offloading


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Input:
    """The object that the backward of a layer holds in place of its input."""

    copy: Tensor
    device: torch.device
    before: weakref.ref[_Input] | None
    """The input that was offloaded before it, which the backward needs next."""


class _LayerInputs:
    """Copies layer inputs in parallel with the computation, on one stream: an input is offloaded while its layer
    computes, and fetched while the layer after it is recomputed. The last input is needed first and stays on the
    device.

    Only one tensor is copied at a time, and it is held until the computation has waited for the stream. So at most one
    tensor is on the device that no layer uses, memory is freed in the order of the computation (no record_stream), and
    the host never waits.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._stream: Any = None
        self._last: weakref.ref[_Input] | None = None
        self._under_way: tuple[_Input, Tensor] | None = None

    def leave(self, tensor: Tensor) -> _Input | Tensor:
        """The pack hook: a copy of the tensor starts once all computation asked for so far is done."""
        tensor = tensor.detach()
        if not tensor.numel():  # torch 2.11 saves an empty tensor with every input, on another device
            return tensor
        self._wait(tensor.device)
        copy = torch.empty_like(tensor, device=self._place, pin_memory=tensor.is_cuda)
        self._copy(tensor, copy, tensor.device)
        one = _Input(copy, tensor.device, self._last)
        self._under_way, self._last = (one, tensor), weakref.ref(one)
        return one

    def come_back(self, one: _Input | Tensor) -> Tensor:
        """The unpack hook: computation asked for from now on finds the tensor as it was."""
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
        """Computation asked for from now on comes after the copy under way, whose tensor is then free to go."""
        if self._stream:
            torch.get_device_module(device).current_stream().wait_stream(self._stream)
        self._under_way = None
