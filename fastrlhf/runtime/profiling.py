"""Callbacks that profile a range of steps: a trace of torch's profiler, and a history of the memory of a CUDA GPU."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from fastrlhf.config import TrainConfig
from fastrlhf.distributed.ranks import rank, world_size

log = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder in `output_dir` to which profiles are written."""

MAX_EVENTS = 1_000_000
"""Number of allocations and releases that a history of memory keeps; older ones are dropped."""


class _OfSteps(ABC):
    """A callback that is active from the start of step `first` to the end of step `last`. If a run resumes within this
    range, the profile begins anew; if a run ends within the range, the profile so far is written."""

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self._first, self._last, self._folder, self._on = first, last, folder, False

    def on_start(self, state: Any) -> None:
        self._begin_after(state.step)

    def on_step(self, state: Any) -> None:
        if self._on and state.step == self._last:
            self._finish()
        self._begin_after(state.step)

    def on_end(self, state: Any) -> None:
        if self._on:
            self._finish()

    def close(self) -> None:
        """Ends the profile of a run that has failed, without writing it."""
        if self._on:
            self._on = False
            self.end(None)

    @abstractmethod
    def begin(self) -> None:
        """Begins the profile."""

    @abstractmethod
    def end(self, path: Path | None) -> None:
        """Ends the profile and writes it to a file whose name is `path` plus an ending; with None the profile is
        dropped."""

    def _begin_after(self, step: int) -> None:
        if not self._on and self._first <= step + 1 <= self._last:
            self._on = True
            self.begin()

    def _finish(self) -> None:
        self._on = False
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{self._last}" + (f"-rank-{rank()}" if world_size() > 1 else "")
        self.end(self._folder / name)


class TorchProfiler(_OfSteps):
    """Writes a trace of the operations of a range of steps, for chrome://tracing and Perfetto."""

    def begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def end(self, path: Path | None) -> None:
        self._profiler.stop()
        if path:
            file = path.with_name(f"{path.name}.trace.json")
            self._profiler.export_chrome_trace(str(file))
            log.info("profile: %s", file)


class MemorySnapshot(_OfSteps):
    """Writes the allocations and releases of GPU memory in a range of steps, for https://pytorch.org/memory_viz."""

    def begin(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)

    def end(self, path: Path | None) -> None:
        if path:
            file = path.with_name(f"{path.name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(file))
            log.info("memory snapshot: %s", file)
        torch.cuda.memory._record_memory_history(enabled=None)


def profilers(config: TrainConfig) -> list[tuple[str, Any]]:
    """Returns the callbacks of `profile_steps`, as (name, callback): the profiler, and on a GPU the memory snapshot."""
    if not config.profile_steps:
        return []
    first, last = config.profiled_steps
    folder = Path(config.output_dir) / FOLDER
    found: list[tuple[str, Any]] = [("TorchProfiler", TorchProfiler(first, last, folder))]
    if config.device != "cpu" and torch.cuda.is_available():
        found.append(("MemorySnapshot", MemorySnapshot(first, last, folder)))
    return found
