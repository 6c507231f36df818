"""What `plan` says to a run that ran out of memory."""

from __future__ import annotations

from dataclasses import replace

from fastrlhf.config import TrainConfig
from fastrlhf.models.loading import resolve_device
from fastrlhf.tools.phases import GIB, readable
from fastrlhf.tools.plan import USABLE, plan_run

SHARE = 0.8
"""Of the peak by plan's count: what a change must come below where plan thought that the run would fit. Something that
it does not count then takes the rest."""


def advise(config: TrainConfig) -> str:
    """The largest parts of the peak and the cheapest change, in one line. Raises ValueError as `plan_run` does."""
    config = replace(config, device=str(resolve_device(config.device)))  # auto was this machine's, whatever its memory
    plan = plan_run(config)
    worst = max(plan.phases, key=lambda phase: phase.total)
    largest = sorted(worst.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{what} {readable(size)}" for what, size in largest)
    change = plan.change or plan_run(config, memory_gib=SHARE * plan.peak / USABLE / GIB).change
    return f"plan counts {readable(plan.peak)} in {worst.name}: {parts}; {change}"
