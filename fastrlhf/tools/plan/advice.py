"""Advice for a run that ran out of memory, from the counts of `plan`."""

from __future__ import annotations

from dataclasses import replace
from traceback import clear_frames

from fastrlhf.config import TrainConfig
from fastrlhf.distributed.ranks import world_size
from fastrlhf.models.loading import resolve_device
from fastrlhf.tools.plan.phases import GIB, readable
from fastrlhf.tools.plan.plan import USABLE, plan_run

SHARE = 0.8
"""If plan predicts that the run fits although it ran out of memory, something takes memory that plan does not count.
The advised change must then reduce the predicted peak to this share of itself."""


def add_advice(error: Exception, config: TrainConfig) -> None:
    """Adds the advice as a note to the error. The tensors of the run are freed first."""
    clear_frames(error.__traceback__)
    try:
        error.add_note(advise(config))
    except (ValueError, OSError, MemoryError, RuntimeError) as another:
        error.add_note(f"plan cannot give advice: {another}")


def advise(config: TrainConfig) -> str:
    """Returns one line with the largest parts of the peak and the cheapest change. Raises ValueError as `plan_run`
    does."""
    config = replace(config, device=str(resolve_device(config.device)))  # "auto": this machine's
    plan = plan_run(config)
    worst = max(plan.phases, key=lambda phase: phase.total)
    largest = sorted(worst.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{what} {readable(size)}" for what, size in largest)
    change = plan.change or plan_run(config, memory_gib=SHARE * plan.peak / USABLE / GIB).change
    counted = f"plan counts {readable(plan.peak)} in the phase {worst.name}"
    if world_size() > 1:
        counted += f" for a single process (each of the {world_size()} holds a share of weights, gradients and moments)"
    return f"{counted}: {parts}; {change}"
