"""How much memory a piece of code needs, on the CPU."""

from collections.abc import Callable
from typing import Any

from torch.profiler import profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that was allocated at once, beyond what was there."""
    with profile(profile_memory=True) as recorded:
        function()
    current = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak
