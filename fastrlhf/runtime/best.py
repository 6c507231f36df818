"""Compares the evaluations of a run: keeps the weights of the best evaluation, and stops the run early if the
evaluations no longer improve."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig
from fastrlhf.distributed.ranks import on_first
from fastrlhf.models.shards import write_tensors
from fastrlhf.models.vocabulary import save_configs
from fastrlhf.runtime.atomic import check_folder, discard_folder, write_folder
from fastrlhf.runtime.checkpoint import load_trained_weights, trained_weights

log = logging.getLogger(__name__)


class BestModel:
    """The best evaluation so far, as a part of a run with a state.

    As in transformers, every improvement makes an evaluation the best, and only improvements above
    `early_stopping_threshold` reset the count of `early_stopping_patience`. A value that is not finite is never best.
    The weights of the best evaluation are in `best-N/` of the run's folder, where N is its step; a folder that the
    newest checkpoint refers to is kept until the next checkpoint is saved.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path | None,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """`models`: folder in a checkpoint ("" for the policy) -> trained model."""
        self._config, self._folder, self._models, self._tokenizer = config, folder, models, tokenizer
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self._misses, self.stopped = 0, False
        self._needed: int | None = None

    @property
    def keeps_weights(self) -> bool:
        return self._config.load_best_model_at_end

    @property
    def step(self) -> int | None:
        """Step of the best evaluation so far; None before the first evaluation."""
        return self._step

    def seen(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Compares the evaluation after `step` with the best one before it. Returns whether it is the new best one;
        `stopped` says whether the run ends with this step. Every rank must call it.

        Raises ValueError if the evaluation lacks the metric.
        """
        config, name = self._config, self._config.best_metric
        if not config.watches_evaluations:
            return False
        if name not in metrics:
            raise ValueError(f"metric_for_best_model: must be one of {', '.join(sorted(metrics))}; got {name!r}")
        value, best = metrics[name], self._metrics.get(name)
        gain = math.inf if best is None else (value - best) * (1 if config.larger_is_better else -1)
        improved = math.isfinite(value) and gain > 0
        if improved and gain > config.early_stopping_threshold:
            self._misses = 0
        else:
            self._misses += 1
        if improved:
            self._step, self._metrics = step, dict(metrics)
        if 0 < config.early_stopping_patience <= self._misses:
            self.stopped = True
            log.info("the run stops after step %d: %s has not improved in %d evaluations", step, name, self._misses)
        return improved

    def save(self) -> None:
        """Writes the weights of the best evaluation, which the models must have at the moment, and deletes older ones
        that no checkpoint needs. Every rank must call it."""
        assert self._folder is not None
        write_folder(self._path(self._step), self._fill)
        self._tidy()

    def checkpoint_saved(self) -> None:
        """Deletes the weights that the checkpoint saved last does not refer to. Every rank must call it."""
        self._needed = self._step
        if self.keeps_weights:
            self._tidy()

    def restore(self) -> dict[str, float]:
        """Loads the weights of the best evaluation into the models; returns the metrics of this evaluation. Without
        weights to restore, it returns an empty mapping and leaves the models as they are."""
        if not self.keeps_weights or self._step is None:
            return {}
        for name, model in self._models.items():
            load_trained_weights(model, self._path(self._step) / name / "model")
        log.info("the best evaluation is that of step %d: its weights are saved", self._step)
        return self._metrics

    def discard(self) -> None:
        """Deletes the kept weights after the final model has been saved."""
        self._step = self._needed = None
        if self.keeps_weights:
            self._tidy()

    def state_dict(self) -> dict[str, Any]:
        state = {"step": self._step, "metrics": self._metrics, "misses": self._misses, "stopped": self.stopped}
        return state if self._metrics or self._misses else {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._step, self._metrics = state.get("step"), dict(state.get("metrics", {}))
        self._misses, self.stopped = state.get("misses", 0), state.get("stopped", False)

    def check_kept(self) -> None:
        """After a run is resumed, forgets the best evaluation, with a warning, if its weights are lost. Every rank must
        call it."""
        self._needed = self._step
        if not self.keeps_weights or self._step is None:
            return
        try:
            check_folder(self._path(self._step))
        except (ValueError, OSError) as damage:
            log.warning("%s is lost: only later evaluations can be best: %s", self._path(self._step), damage)
            self._step, self._metrics = None, {}

    def _path(self, step: int | None) -> Path:
        assert self._folder is not None
        return self._folder / f"best-{step}"

    def _fill(self, folder: Path) -> None:
        on_first(lambda: self._write_configs(folder))
        for name, model in self._models.items():
            write_tensors(folder / name / "model", trained_weights(model))

    def _write_configs(self, folder: Path) -> None:
        assert self._tokenizer is not None
        for name, model in self._models.items():
            save_configs(model, folder / name)
            self._tokenizer.save_pretrained(folder / name)

    def _tidy(self) -> None:
        folder = self._folder
        assert folder is not None
        kept = [self._path(step) for step in (self._step, self._needed) if step is not None]
        on_first(lambda: [discard_folder(path) for path in folder.glob("best-*") if path not in kept])
