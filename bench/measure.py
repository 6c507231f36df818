"""Measures the time, the memory and the error (relative to float64) of a forward and backward step.

Time is measured by CUDA events after the L2 cache has been overwritten; on a CPU it is wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import profile

Key = TypeVar("Key", bound=Hashable)
Tensors = tuple[Tensor, ...]
LEAST_RUNS = 3
FACTOR, EPSILONS = 2.0, 4.0  # tolerance of `excess`: FACTOR times plain torch's error, plus EPSILONS roundings


@dataclass(frozen=True)
class Step:
    """A step: a forward function, and a backward pass that computes the gradients of the tensors `leaves`."""

    forward: Callable[[], Tensors]
    leaves: Tensors = ()
    upstream: Tensors = ()
    """Upstream gradients of the first outputs; a 0-dim loss needs none."""

    def backward(self, outputs: Tensors) -> Tensors:
        if not self.leaves:
            return ()
        upstream = None
        if outputs[0].dim():
            upstream = [g.to(o.dtype) for o, g in zip(outputs, self.upstream, strict=False)]
        return torch.autograd.grad(outputs, self.leaves, upstream)


def run(step: Step) -> tuple[Tensors, Tensors]:
    """Runs a step; returns (outputs, gradients)."""
    outputs = step.forward()
    return outputs, step.backward(outputs)


def now(device: torch.device) -> float:
    """Returns the current time in seconds: wall-clock time after waiting for the GPU, or on a CPU the CPU time of this
    process. CPU time excludes other processes but is summed over threads, so use one thread.
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Timer:
    """A timer of a step. A call runs the step and returns the milliseconds of (forward, backward)."""

    def __init__(self, device: torch.device):
        self.scratch = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.scratch = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, step: Step) -> tuple[float, float]:
        if self.scratch is None:
            start = time.perf_counter()
            outputs = step.forward()
            middle = time.perf_counter()
            step.backward(outputs)
            return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.scratch.zero_()
        start.record()
        outputs = step.forward()
        middle.record()
        step.backward(outputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(middle), middle.elapsed_time(end)


def interleave(
    steps: Mapping[Key, Step | Callable[[], tuple[float, float]]], device: torch.device, runs: int, seconds: float
) -> dict[Key, dict[str, Any] | Exception]:
    """Times the steps alternately for `runs` rounds, so that clock speed and heat affect all of them equally.

    A step is a `Step`, or a function that measures its own time and returns the milliseconds of (forward, backward). A
    step that has used up its `seconds` stops after `LEAST_RUNS` rounds. Returns the medians of each step, with the 20 %
    and 80 % quantiles of the total; for a step that raised an exception, returns the exception.
    """
    timer, times, failed = Timer(device), {key: [] for key in steps}, {}
    for _ in range(runs):
        for key, step in steps.items():
            past = times[key]
            if key in failed or (len(past) >= LEAST_RUNS and sum(map(sum, past)) > 1e3 * seconds):
                continue
            try:
                past.append(timer(step) if isinstance(step, Step) else step())
            except Exception as error:
                failed[key] = error.with_traceback(None)  # a traceback would keep tensors alive
    return {key: failed.get(key) or _summary(past) for key, past in times.items()}


def _summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    forward, backward = torch.tensor(times, dtype=torch.float64).unbind(1)
    total = forward + backward
    low, middle, high = total.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {
        "runs": len(times),
        "forward_ms": forward.quantile(0.5).item(),
        "backward_ms": backward.quantile(0.5).item(),
        "total_ms": middle,
        "total_ms_20": low,
        "total_ms_80": high,
    }


def peak_extra_bytes(step: Step, device: torch.device) -> tuple[int, Tensors, Tensors]:
    """Runs a step; returns (extra bytes, outputs, gradients).

    The extra bytes are the peak memory beyond earlier allocations and the returned gradients.
    """
    kept: list[tuple[Tensors, Tensors]] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept.append(run(step))
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = peak_bytes(lambda: kept.append(run(step)))
    outputs, gradients = kept[0]
    return peak - sum(g.nbytes for g in gradients), outputs, gradients


def peak_bytes(function: Callable[[], Any]) -> int:
    """Returns the peak, in bytes, of the CPU memory that torch allocates while `function` runs."""
    with profile(profile_memory=True) as recorded:
        function()
    current = peak = 0
    for event in recorded.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            current += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, current)
    return peak


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Returns the relative error |actual - truth| / |truth| in the Euclidean norm."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


def largest_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).abs().max().item()


def excess(actual: Tensor, plain: Tensor, truth: Tensor) -> str:
    """Describes the error of `actual` if it clearly exceeds the error of plain torch in the same dtype; otherwise
    returns "". Both errors are relative to `truth`, which is in float64.
    """
    allowed = FACTOR * largest_error(plain, truth)
    allowed += EPSILONS * torch.finfo(plain.dtype).eps * truth.abs().max().item()
    error = largest_error(actual, truth)
    return "" if error <= allowed else f"error {error:.2g}, allowed {allowed:.2g}"
