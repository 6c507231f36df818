"""Frozen models that wait in CPU memory while nobody asks them anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module


class Waiting:
    """The weights of frozen models, but for those that models which stay share with them.

    They never change, so that a copy on the CPU is made once and nothing is copied back.
    """

    def __init__(self, frozen: Sequence[Module], staying: Sequence[Module], device: torch.device) -> None:
        stay = {id(weight) for model in staying for weight in model.parameters()}
        weights = {id(weight): weight for model in frozen for weight in model.parameters() if id(weight) not in stay}
        self._device, self._weights = device, list(weights.values())
        self._kept = [_on_host(weight.data, pinned=device.type == "cuda") for weight in self._weights]
        self._leave()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Within it, the models are on the device."""
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
    """Straight into pinned memory, so that no second copy is made."""
    return torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)
