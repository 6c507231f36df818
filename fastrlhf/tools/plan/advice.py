"""What `plan` says to a run that ran out of memory."""

from __future__ import annotations

from dataclasses import replace
from traceback import clear_frames

from fastrlhf.config import TrainConfig
from fastrlhf.distributed.ranks import world_size
from fastrlhf.models.loading import resolve_device
from fastrlhf.tools.plan.phases import GIB, readable
from fastrlhf.tools.plan.plan import USABLE, plan_run

SHARE = 0.8
"""Of the peak by plan's count: what a change must come below where plan thought that the run would fit. Something that
it does not count then takes the rest."""


def add_advice(error: Exception, config: TrainConfig) -> None:
    """What `plan` thinks of it, as a note, once the tensors of the run are gone."""
    clear_frames(error.__traceback__)
    try:
        error.add_note(advise(config))
    except (ValueError, OSError, MemoryError, RuntimeError) as another:
        error.add_note(f"plan has no advice: {another}")


def advise(config: TrainConfig) -> str:
    """The largest parts of the peak and the cheapest change, in one line. Raises ValueError as `plan_run` does."""
    config = replace(config, device=str(resolve_device(config.device)))  # auto was this machine's, whatever its memory
    plan = plan_run(config)
    worst = max(plan.phases, key=lambda phase: phase.total)
    largest = sorted(worst.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{what} {readable(size)}" for what, size in largest)
    change = plan.change or plan_run(config, memory_gib=SHARE * plan.peak / USABLE / GIB).change
    counted = f"plan counts {readable(plan.peak)} in {worst.name}"
    if world_size() > 1:
        counted += f", of one process (each of the {world_size()} has a share of weights, gradients and moments)"
    return f"{counted}: {parts}; {change}"
