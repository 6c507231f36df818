"""Records a step that always does the same work on the same memory as a CUDA graph, and replays it without launch
overhead.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import nn

from fastrlhf.runtime.out_of_memory import is_out_of_memory


class CapturedSteps:
    """Runs steps under keys that describe their shapes. The first step of a key runs normally, the second one is
    recorded, and all later ones replay the graph.

    A step changes tensors in place. It may allocate memory, but must not read a tensor on the host or draw from a
    generator. All steps of a key must use the same memory, including that of the weights. Make a new object for every
    rollout, because weights may be replaced between rollouts, which would make a graph invalid.

    Graphs kept after a rollout would also hold memory that training needs, mainly the keys and values of all slots, and
    would save little time: a rollout records one graph per number of slots and of key blocks (rollout/kv_cache.py),
    which are few compared with hundreds of steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Raises ValueError if the step cannot be captured; out-of-memory errors are raised unchanged."""
        if key not in self._graphs:
            # In the first call, libraries choose kernels and allocate workspaces, which must not be recorded.
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
