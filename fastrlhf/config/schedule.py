"""The keys of the learning rate schedule, under transformers' names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from fastrlhf.config.checks import at_least, require

SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles", "warmup_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
}
"""Schedule -> the keys that its `lr_scheduler_kwargs` may have."""

ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on the number of steps of the run."""


@dataclass(frozen=True, kw_only=True)
class ScheduleKeys:
    """The keys of the learning rate schedule."""

    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    """Learning rate schedule after warm-up, under transformers' name. linear, cosine: from the peak to 0 at the end of
    the run. constant: the peak throughout. `lr_scheduler_kwargs` has the parameters of the others."""
    lr_scheduler_kwargs: str = ""
    """Parameters of the schedule, as in transformers, for example {"min_lr_rate": 0.1} for cosine_with_min_lr or
    {"num_decay_steps": 200} for warmup_stable_decay: a mapping in YAML, or JSON in a flag."""
    warmup_steps: int = 0
    """Number of optimiser steps over which the learning rate rises linearly to its peak. The n steps have 1/(n + 1) to
    n/(n + 1) of the peak."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of the optimiser steps of the run, rounded up, in place of `warmup_steps`."""

    def check_schedule(self) -> None:
        """Raises ValueError for parameters that the schedule does not have or lacks, and for two lengths of the
        warm-up."""
        at_least(self, 0, "warmup_steps")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "at least 0 and below 1")
        rule = f"0 when warmup_steps is {self.warmup_steps}: give one of the two"
        require(not (self.warmup_steps and self.warmup_ratio), "warmup_ratio", self.warmup_ratio, rule)
        kind, given = self.lr_scheduler_type, parse_scheduler_kwargs(self.lr_scheduler_kwargs)
        known = SCHEDULES[kind]
        told = f"a mapping with keys among {', '.join(known)}" if known else "empty"
        rule = f"{told} when lr_scheduler_type is {kind}"
        require({*given} <= {*known}, "lr_scheduler_kwargs", self.lr_scheduler_kwargs, rule)
        if "with_min_lr" in kind:
            rule = f"a mapping with either min_lr or min_lr_rate when lr_scheduler_type is {kind}"
            one = ("min_lr" in given) != ("min_lr_rate" in given)
            require(one, "lr_scheduler_kwargs", self.lr_scheduler_kwargs, rule)
        if kind == "warmup_stable_decay":
            rule = 'a mapping such as {"num_decay_steps": 200} when lr_scheduler_type is warmup_stable_decay'
            require("num_decay_steps" in given, "lr_scheduler_kwargs", self.lr_scheduler_kwargs, rule)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Returns the number of warm-up steps of a run of `num_steps` optimiser steps."""
        return self.warmup_steps or math.ceil(num_steps * self.warmup_ratio)


def parse_scheduler_kwargs(lr_scheduler_kwargs: str) -> dict[str, Any]:
    """Parses the JSON of `lr_scheduler_kwargs` to a mapping; empty text gives an empty mapping. Raises ValueError if it
    is not a mapping of names to numbers or texts."""
    try:
        values = json.loads(lr_scheduler_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"lr_scheduler_kwargs: not valid JSON: {error}") from error
    plain = isinstance(values, dict) and all(isinstance(value, int | float | str) for value in values.values())
    require(plain, "lr_scheduler_kwargs", lr_scheduler_kwargs, 'a mapping such as {"min_lr_rate": 0.1}')
    return values
