"""CUDA graphs: a step that always does the same work on the same memory is recorded once and replayed without launches.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import nn

from fastrlhf.runtime.out_of_memory import is_out_of_memory


class CapturedSteps:
    """Runs steps by the key of their shapes: the first of a key as it is, then one recorded graph of it.

    A step takes tensors, changes tensors in place, allocates what it likes, and neither reads a tensor on the host nor
    draws from a generator. All steps of a key must use the same memory, the weights included: make a new one of these
    for every rollout, between which weights may be replaced, and nothing can be stale.

    Graphs that outlived a rollout would hold the memory that they were recorded on, the keys and values of all slots
    above all, while training needs it. What they would save is little: to record one is to launch the kernels of a step
    once more, and a rollout has one per number of slots and block of keys (rollout/kv_cache.py), so a few
    among hundreds of steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Raises ValueError where the step cannot be captured, but for want of memory."""
        if key not in self._graphs:
            # Libraries choose kernels and take workspaces at a first call, which no graph may hold.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(step)
        graph.replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"decode: {self._name} cannot be captured in a CUDA graph; set eager: {error}") from error
        return graph
