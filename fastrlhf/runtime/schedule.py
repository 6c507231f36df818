"""The learning rate of each step, as a share of its peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastrlhf.config import TrainConfig, require
from fastrlhf.config.schedule import parse_scheduler_kwargs

DIRECT = ("linear", "cosine", "constant", "constant_with_warmup")
"""Schedules that are computed here; the others are called from transformers."""


def schedule(config: TrainConfig, num_steps: int, peak: float) -> Callable[[int], float]:
    """Returns the function from the number of steps done to the learning rate of the next step, divided by `peak`. It
    depends on nothing else, so a resumed run has the learning rates of an uninterrupted one. `num_steps` is the number
    of optimiser steps of the run.

    After the warm-up, step n has the learning rate of transformers' schedule at step n. A warm-up of w steps has
    1/(w + 1) to w/(w + 1) of the peak, where transformers has 0/w to (w - 1)/w: a step with the learning rate 0 would
    be wasted. Transformers' schedules with one more step of warm-up, from their second step on, have these values. Only
    cosine_warmup_with_min_lr is called unchanged, because its warm-up does not start at 0.

    Raises ValueError for parameters that the schedule refuses or that exceed the run.
    """
    warmup, kind = config.num_warmup_steps(num_steps), config.lr_scheduler_type
    settings = parse_scheduler_kwargs(config.lr_scheduler_kwargs)
    if kind in DIRECT and not settings:
        return lambda step: _direct(step, num_steps, warmup, kind)
    if kind == "inverse_sqrt":
        settings = {"timescale": warmup or 10_000} | settings  # transformers' default for this warm-up
    if kind == "warmup_stable_decay":
        decay, rule = settings["num_decay_steps"], f"at most the {num_steps} steps of the run minus {warmup} of warm-up"
        require(decay <= num_steps - warmup, "lr_scheduler_kwargs: num_decay_steps", decay, rule)
    from transformers import get_scheduler

    shift = 0 if kind == "cosine_warmup_with_min_lr" else 1
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=peak)
    try:
        schedule = get_scheduler(kind, placeholder, warmup + shift, num_steps + shift, settings)
        share = cast(LambdaLR, schedule).lr_lambdas[0]
        share(shift)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs: {config.lr_scheduler_kwargs} is refused by {kind}: {error}") from error
    return lambda step: share(step + shift)


def _direct(step: int, num_steps: int, warmup: int, kind: str) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    if kind.startswith("constant"):
        return 1.0
    return max(0.0, 1 - done) if kind == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
