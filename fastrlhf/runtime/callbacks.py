"""Calls user-defined code at fixed points of a run.

A callback is an object with any of the methods of `Callback`. A program passes callbacks to a trainer, and the key
`callbacks` names classes, which are made without arguments. All ranks call every callback, one rank's error is raised
on every rank, and a request of any rank counts for all. A callback must not exchange data between ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig
from fastrlhf.config.functions import load_function
from fastrlhf.distributed.ranks import from_all, rank, together
from fastrlhf.runtime.profiling import profilers

log = logging.getLogger(__name__)

POINTS = ("on_start", "on_step", "on_evaluate", "on_save", "on_end")


class RunState:
    """The state of a run that callbacks read, and the requests that they may make."""

    def __init__(
        self,
        config: TrainConfig,
        max_steps: int,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.config, self.max_steps, self.model, self.tokenizer = config, max_steps, model, tokenizer
        self.step = 0
        """Number of optimiser steps (on-policy: updates) that are done."""
        self.metrics: dict[str, float] = {}
        """Metrics of the step or of the evaluation, under their names in metrics.jsonl; empty in `on_start`."""
        self.output_dir = Path(config.output_dir) if config.output_dir else None
        self.rank = rank()
        """Rank of this process; 0 if there is only one."""
        self.requests: set[str] = set()

    def stop(self) -> None:
        """Asks the run to end after this step. It evaluates, if it has held-out rows, and saves the final model."""
        self.requests.add("stop")

    def save(self) -> None:
        """Asks the run to save a checkpoint after this step."""
        self.requests.add("save")

    def evaluate(self) -> None:
        """Asks the run to evaluate after this step; only `on_step` can make this request."""
        self.requests.add("evaluate")


class Callback:
    """The methods that a run calls; a callback may have any of them and need not derive from this class."""

    def on_start(self, state: RunState) -> None:
        """Called before the first step, after a resumed run has been restored."""

    def on_step(self, state: RunState) -> None:
        """Called after each optimiser step (on-policy: update), before the evaluation that is due after it."""

    def on_evaluate(self, state: RunState) -> None:
        """Called after each evaluation; `state.metrics` holds the metrics of the step and of the evaluation."""

    def on_save(self, state: RunState) -> None:
        """Called after each checkpoint that `save_steps` or a callback asks for."""

    def on_end(self, state: RunState) -> None:
        """Called after the final model has been saved; `state.metrics` are the metrics of the last evaluation, or of
        the best evaluation if the run ends with the best model."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for checkpoints: a flat mapping of names to tensors and JSON values; it may be empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restores a state, before `on_start`."""


class Callbacks:
    """The callbacks of a run: those that a program passes, those of the key `callbacks`, and the profilers of
    `profile_steps`."""

    def __init__(
        self,
        config: TrainConfig,
        given: Sequence[Any],
        max_steps: int,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        named = [(type(callback).__name__, callback) for callback in given]
        for name, callback in named:
            _check(name, callback)
        self.given = _by_name(named)
        """The callbacks that a program passes, by name."""
        self._all = _by_name([*named, *load_callbacks(config), *profilers(config)])
        self._state = RunState(config, max_steps, model, tokenizer)
        self.stopped = False
        """Whether a callback has asked the run to end."""

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def parts(self) -> dict[str, Any]:
        """The callbacks that have a state, by the names of their parts of a checkpoint."""
        return {
            f"callback-{number}": callback
            for number, callback in enumerate(self._all.values())
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
        }

    def call(self, point: str, step: int, metrics: Mapping[str, float]) -> None:
        """Calls the method `point` of every callback that has it. An error gets a note that names the callback. Every
        rank must call it."""
        if not self._all:
            return
        self._state.step, self._state.metrics = step, dict(metrics)
        together(lambda: self._call(point))
        requests = from_all(sorted(self._state.requests))
        self._state.requests = {request for asked in requests for request in asked}
        if "stop" in self._state.requests and not self.stopped:
            self.stopped = True
            if point != "on_end":
                log.info("the run stops after step %d: a callback has asked for it", step)

    def takes(self, request: str) -> bool:
        """Returns whether a callback has made this request since the last call with it, and forgets the request."""
        asked = request in self._state.requests
        self._state.requests.discard(request)
        return asked

    def close(self) -> None:
        """Ends the profiles that are still active, without writing them."""
        for callback in self._all.values():
            if hasattr(callback, "close"):
                callback.close()

    def _call(self, point: str) -> None:
        for name, callback in self._all.items():
            if (method := getattr(callback, point, None)) is not None:
                try:
                    method(self._state)
                except Exception as error:
                    error.add_note(f"raised by {point} of the callback {name}")
                    raise


def load_callbacks(config: TrainConfig) -> list[tuple[str, Any]]:
    """Makes the callbacks that the key `callbacks` names, as (name, callback).

    Raises ValueError, naming the callback, for a class that does not exist, needs arguments or has no method that a run
    calls.
    """
    made = []
    for name in config.callbacks:
        kind = load_function(name, "callbacks", "class")
        try:
            callback = kind()
        except TypeError as error:
            raise ValueError(f"callbacks: {name!r} cannot be made without arguments: {error}") from error
        _check(name, callback)
        made.append((name, callback))
    return made


def _check(name: str, callback: Any) -> None:
    if not any(hasattr(callback, point) for point in POINTS):
        raise ValueError(f"callbacks: {name!r} has none of the methods {', '.join(POINTS)}")


def _by_name(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the callbacks by name; the second of equal names gets the suffix " 2"."""
    named: dict[str, Any] = {}
    for name, callback in pairs:
        number = sum(other == name or other.startswith(f"{name} ") for other in named)
        named[f"{name} {number + 1}" if number else name] = callback
    return named
