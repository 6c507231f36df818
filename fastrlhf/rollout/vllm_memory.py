"""Shared memory that passes weights from the trainer to the vLLM processes.

It is an anonymous file (memfd) that holds one group of weights at a time. The model is therefore never copied as a
whole, and no file remains if a process is killed.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

GROUP_BYTES = 64 * 2**20
"""Maximum number of bytes of a group of weights; a larger weight forms a group by itself."""
ALIGNMENT = 64
"""Every weight starts at a multiple of this many bytes."""

Weights = Iterable[tuple[str, Tensor]]
Entry = tuple[str, torch.dtype, tuple[int, ...], int]
"""(name, dtype, shape, offset in bytes) of a weight in the memory."""


class SharedMemory:
    """One process's view of the shared memory, whose size is that of the largest group written so far."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def create(cls) -> SharedMemory:
        """Creates a new memory. Processes that inherit its `descriptor` see what is written. The descriptor is closed
        when the object is dropped."""
        memory = cls(os.memfd_create("fastrlhf-weights"))
        weakref.finalize(memory, os.close, memory.descriptor)
        return memory

    def write(self, weights: Sequence[tuple[str, Tensor]]) -> list[Entry]:
        """Replaces the content of the memory. Returns the entries, which another process must pass to `read`."""
        entries, end = [], 0
        for name, weight in weights:
            entries.append((name, weight.dtype, tuple(weight.shape), end))
            end += _room(weight)
        if end > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, end)
        memory = self._mapped()
        for (_, weight), (_, _, _, start) in zip(weights, entries, strict=True):
            memory[start : start + weight.nbytes].copy_(weight.reshape(-1).view(torch.uint8))
        return entries

    def read(self, entries: Iterable[Entry], device: torch.device) -> list[tuple[str, Tensor]]:
        """Returns copies of the weights on `device`."""
        memory, weights = self._mapped(), []
        for name, dtype, shape, start in entries:
            size = torch.Size(shape).numel() * dtype.itemsize
            weights.append((name, memory[start : start + size].view(dtype).view(shape).to(device, copy=True)))
        return weights

    def _mapped(self) -> Tensor:
        """Returns all bytes of the memory as uint8."""
        size = os.fstat(self.descriptor).st_size
        if size > len(self._bytes):
            self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        return self._bytes


def groups(weights: Weights, size: int = GROUP_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
    """Yields the weights in order, in groups of at most `size` bytes; a larger weight forms a group by itself."""
    group: list[tuple[str, Tensor]] = []
    used = 0
    for name, weight in weights:
        if group and used + _room(weight) > size:
            yield group
            group, used = [], 0
        group.append((name, weight))
        used += _room(weight)
    if group:
        yield group


def _room(weight: Tensor) -> int:
    return -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
