"""Recognises out-of-memory errors, and finds where in a run they happened."""

from __future__ import annotations

import re
import sys
import traceback

PLACES = {
    "fastrlhf.models.loading": "loading a model",
    "fastrlhf.runtime.optim": "the optimiser",
    "fastrlhf.rollout.engine": "the rollout",
    "fastrlhf.rollout.vllm": "the rollout",
    "fastrlhf.algorithms.experience": "scoring the rollouts",
    "fastrlhf.algorithms.reference": "the reference's log-probs",
    "fastrlhf.evaluation.judges": "the judge",
    "fastrlhf.evaluation.held_out": "the evaluation",
    "fastrlhf.runtime.checkpoint": "saving",
}
"""Module -> what it does, for the message. An error outside these modules comes from a forward or backward pass of
training."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out: torch.OutOfMemoryError on a GPU; on a CPU MemoryError, or a
    RuntimeError of torch's allocator."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def describe(error: BaseException) -> str:
    """Formats an out-of-memory error on one line: where it happened, the size requested, and its notes."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [PLACES[name] for name in frames if name in PLACES]
    size = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    where = f"out of memory in {places[-1] if places else 'a forward or backward'}"
    return "; ".join([where + (f" ({size[1]} more)" if size else ""), *getattr(error, "__notes__", ())])
