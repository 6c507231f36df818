"""Plans a run before any weight is loaded: its memory, steps and tokens, and, if it does not fit, a change that helps.

tools/plan/phases.py says what is counted, tools/plan/packs.py makes the packs of the first steps, and
tools/plan/changes.py finds the change.

`fastrlhf plan --config FILE [--command drpo] [--memory_gib 80]` exits with code 1 if the run does not fit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastrlhf.config import PPOConfig, TrainConfig, require
from fastrlhf.models.loading import resolve_device
from fastrlhf.models.offload import check_offloading
from fastrlhf.models.precision import fast_dtype, with_dtype
from fastrlhf.tools.plan.changes import cheapest_change
from fastrlhf.tools.plan.packs import read_rows
from fastrlhf.tools.plan.phases import GIB, Count, Phase, count_phases, readable

USABLE = 0.92
"""Share of the device's memory that the counted parts may fill. The rest is for memory that the plan does not count."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    phases: list[Phase]
    facts: list[str]
    """Lines about parameters, steps and tokens."""
    device: str
    memory: int
    """Memory of the device in bytes."""
    change: str = ""
    """A text that names the change that makes the run fit; empty if the run fits without a change."""
    offer: str = ""
    """A text that says how much memory activation checkpointing would save; empty if it is on or saves nothing."""

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def usable(self) -> int:
        return int(USABLE * self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


def plan_run(config: TrainConfig, *, memory_gib: float = 0.0) -> Plan:
    """Plans a run for this machine's device or, with `memory_gib`, for a device with that much memory.

    Raises ValueError, as the run would, for a missing model, tokenizer or dataset.
    """
    require(memory_gib >= 0, "memory_gib", memory_gib, "at least 0")
    device = resolve_device(config.device)
    if memory_gib:
        name, memory = f"a device of {memory_gib:g} GiB", int(memory_gib * GIB)
    else:
        name, memory = _device_memory(device)
    may_offload = device.type == "cuda" or (memory_gib > 0 and config.device != "cpu")
    if config.activation_offloading and not may_offload:
        check_offloading(device)
    if config.dtype == "auto":
        # If only the memory of the device is given, the device counts as a GPU that multiplies bfloat16.
        config = replace(config, dtype=fast_dtype(config, True)) if memory_gib and may_offload else with_dtype(config)
    if isinstance(config, PPOConfig) and not may_offload:
        config = replace(config, ref_reward_offload=False)  # offloading has no effect on a CPU
    # Rows are read on this machine; whether the planned device can offload was checked above.
    rows, is_cuda = read_rows(replace(config, activation_offloading=False)), device.type == "cuda"
    count = count_phases(config, rows, is_cuda=is_cuda, memory=memory)
    plan = Plan(phases=count.phases, facts=count.facts, device=name, memory=memory)
    if plan.fits:
        return replace(plan, offer="" if config.activation_checkpointing else _offer(count, plan.peak))
    change = cheapest_change(
        config, rows, count.phases, plan.usable, memory=memory, is_cuda=is_cuda, may_offload=may_offload
    )
    return replace(plan, change=change)


def _offer(count: Count, peak: int) -> str:
    try:
        least = count.peak_recomputed()
    except ValueError:  # the layers of the model cannot be recomputed
        return ""
    saves = f"--activation_checkpointing true: {readable(least)}, for about a third more time"
    return saves if least < peak else ""


def format_plan(plan: Plan) -> str:
    worst = max(plan.phases, key=lambda phase: phase.total)
    unit, name, digits = (GIB, "GiB", 2) if plan.peak >= GIB else (2**20, "MiB", 1)
    output = [*plan.facts]
    for phase in plan.phases:
        output += ["", f"{phase.name}{'  <- the peak' if phase is worst else ''}"]
        parts = {what: size for what, size in phase.parts.items() if size} | {"total": phase.total}
        output += [f"  {size / unit:9.{digits}f} {name}  {what}" for what, size in parts.items()]
    verdict = "fits" if plan.fits else "does not fit"
    output += ["", f"needs {readable(plan.peak)}; {USABLE:.0%} of {plan.device} is {readable(plan.usable)}: {verdict}"]
    return "\n".join([*output, *filter(None, (plan.change, plan.offer))])


def _device_memory(device: torch.device) -> tuple[str, int]:
    """Returns name and size in bytes of a device's memory. For the CPU the size is at most the container's limit."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return "this machine's memory", physical if allowed == "max" else min(physical, int(allowed))
