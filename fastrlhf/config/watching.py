"""Keys for the best evaluation, early stopping, callbacks and profiles of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from fastrlhf.config.checks import at_default, at_least, require


@dataclass(frozen=True, kw_only=True)
class WatchKeys:
    """The keys of the best model, of early stopping, of callbacks and of profiles."""

    BEST_METRIC: ClassVar[str] = "eval_loss"
    """The metric that is used if `metric_for_best_model` is empty."""

    load_best_model_at_end: bool = False
    """Save the weights of the best evaluation, not the last weights, at the end of the run. Until then they are kept in
    `best-N/` in `output_dir`, where N is the step of the evaluation."""
    metric_for_best_model: str = ""
    """Metric by which the best evaluation is chosen; the prefix eval_ may be left out. Empty: eval_loss, or
    eval_objective/scores in on-policy runs."""
    greater_is_better: bool | None = None
    """Whether a larger value of `metric_for_best_model` is better. null: true unless the name ends in loss."""
    early_stopping_patience: int = 0
    """The run stops after this number of successive evaluations without an improvement of `metric_for_best_model`. 0:
    no early stopping."""
    early_stopping_threshold: float = 0.0
    """Smallest improvement that resets the count of `early_stopping_patience`."""
    callbacks: tuple[str, ...] = ()
    """Classes of callbacks, which the run calls at its start and end and after steps, evaluations and checkpoints, as
    path/to/file.py:Class or package.module:Class."""
    profile_steps: str = ""
    """First and last step to profile, for example 5:8. The trace of torch's profiler, and on a CUDA GPU a history of
    its memory, are written to `profile/` in `output_dir`."""

    @property
    def watches_evaluations(self) -> bool:
        """Whether the run compares its evaluations with each other."""
        return self.load_best_model_at_end or self.early_stopping_patience > 0

    @property
    def best_metric(self) -> str:
        """The full name of the metric that says which evaluation is best."""
        name = self.metric_for_best_model or self.BEST_METRIC
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger value of `best_metric` is better."""
        if self.greater_is_better is None:
            return not self.best_metric.endswith("loss")
        return self.greater_is_better

    @property
    def profiled_steps(self) -> tuple[int, int]:
        """The first and the last step to profile."""
        first, _, last = self.profile_steps.partition(":")
        return int(first), int(last)

    def check_watching(self, eval_steps: int) -> None:
        """Raises ValueError for a number out of range, for keys that would have no effect, and if the run has no
        evaluations to compare."""
        if self.profile_steps:
            valid = re.fullmatch(r"[1-9]\d*:\d+", self.profile_steps)
            ordered = valid is not None and self.profiled_steps[0] <= self.profiled_steps[1]
            require(ordered, "profile_steps", self.profile_steps, "the first and the last step, such as 5:8")
        at_least(self, 0, "early_stopping_patience", "early_stopping_threshold")
        because = "without load_best_model_at_end and early_stopping_patience"
        patience = "when early_stopping_patience is 0"
        at_default(
            self,
            [
                (self.watches_evaluations, because, ("metric_for_best_model", "greater_is_better")),
                (self.early_stopping_patience > 0, patience, ("early_stopping_threshold",)),
            ],
        )
        if self.watches_evaluations:
            which = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            require(eval_steps > 0, "eval_steps", eval_steps, f"above 0 with {which}, which compares evaluations")

    def check_folder(self, output_dir: str) -> None:
        """Raises ValueError if the run needs a folder and has none."""
        rule = "false without output_dir, to which the best weights are written"
        require(bool(output_dir) or not self.load_best_model_at_end, "load_best_model_at_end", True, rule)
        rule = "empty without output_dir, to which profiles are written"
        require(bool(output_dir) or not self.profile_steps, "profile_steps", self.profile_steps, rule)
