"""The part of a run that all trainers share: output folder, log, checkpoints, resuming, and saving the final model."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig
from fastrlhf.config.functions import function_hashes, object_hashes
from fastrlhf.config.paths import as_given
from fastrlhf.distributed.ranks import failed_together, from_all, late_signals, may_unwind, on_first
from fastrlhf.publish.push import push
from fastrlhf.runtime.atomic import PASSES, sweep
from fastrlhf.runtime.best import BestModel
from fastrlhf.runtime.callbacks import Callbacks
from fastrlhf.runtime.checkpoint import Checkpointer, Stateful, check_run_dir, create_output_dir
from fastrlhf.runtime.disk import check_room, with_room
from fastrlhf.runtime.inputs import Data
from fastrlhf.runtime.locks import locked
from fastrlhf.runtime.merging import acceptance_of, card_of, rescue, save_all
from fastrlhf.runtime.metrics import MetricsWriter, read_metrics
from fastrlhf.runtime.progress import Progress
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.signals import Interrupted, Interrupts
from fastrlhf.runtime.system_metrics import SystemMetrics, is_of_machine
from fastrlhf.runtime.unlogged import Row, Unlogged

log = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """One run of one trainer: `with Run("sft", config, num_steps, (model, tokenizer)) as run`.

    If the folder holds an unfinished run of the same configuration, all models and parts passed to this object are
    restored from the newest checkpoint, and `remaining` continues from there.

    After a stop request (runtime/signals.py) the run saves the last whole step and ends. It ends at once if no weight
    has changed since that step, otherwise at the end of the step or at the next resumable call of `between_parts`. All
    ranks must stop at the same point: at the next call of `between_parts`, `parts` or `log`, or within `apart`
    (distributed/ranks.py: rollouts, judges, evaluations), where they exchange nothing. A step counts as whole as soon
    as its weights are updated; its evaluation may follow after the run is resumed. After the last step the trained
    model is saved first; then Interrupted is raised with `finished`, so that no further stage begins.

    After an error the last whole step is saved as a checkpoint if no weight has changed since, and the same command
    continues from it. Otherwise the weights are saved to `interrupted/`, and a note on the error says so. `SystemExit`
    counts as an error. All ranks make the same calls; only rank 0 writes more than its part of a checkpoint. After an
    error the ranks can save only if all of them have raised the same error.
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        steps: int,
        trained: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
        *,
        value_model: PreTrainedModel | None = None,
        dpo_model: PreTrainedModel | None = None,
        data: Data | None = None,
        parts: Mapping[str, Stateful] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        functions: Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """`value_model` and `dpo_model` are trained together with the model in `trained`. `parts`: name -> other object
        with a state, for example an optimiser (its name ends in "optimizer") or a normaliser. `evaluate` measures the
        model on the held-out rows; it is None if no rows are held out. `functions`: user-defined functions, by name,
        that the configuration does not name. `callbacks`: objects with methods of runtime/callbacks.py."""
        if data and data.day:
            config = dataclasses.replace(config, template_date=data.day)
        self._name, self._config, self._steps, self._trained, self._data = name, config, steps, trained, data
        self._stack = ExitStack()
        self._start = self._saved = self._whole = 0
        self._evaluate, self._final = evaluate, dict[str, float]()
        self._begun, self._stoppable, self._unlogged = 0, False, Unlogged()
        self._finished = False
        self.history: list[dict[str, float]] = []
        self.initial: dict[str, float] = {}
        self.folder = Path(config.output_dir) if config.output_dir else None
        self._checkpointer = None
        self._writer: MetricsWriter | None = None  # of the first rank
        beside = {"value_model": value_model, "dpo_model": dpo_model}
        models = {"": trained[0]} if trained else {}
        models |= {name: model for name, model in beside.items() if model is not None}
        self._best = BestModel(config, self.folder, models, trained[1] if trained else None)
        self._callbacks = Callbacks(config, callbacks, steps, *(trained or (None, None)))
        if self.folder and trained:
            fingerprint = data.fingerprint if data else {}
            hashes = function_hashes(config) | object_hashes({**(functions or {}), **self._callbacks.given})
            stateful = {**(parts or {}), "unlogged": self._unlogged, "best": self._best, **self._callbacks.parts}
            self._checkpointer = Checkpointer(self.folder, models, trained[1], stateful, fingerprint, hashes)

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            if self.folder:
                # Signals are handled until the lock is released, so that no signal leaves the lock file behind.
                self._interrupts = stack.enter_context(Interrupts(self._may_unwind))
                late_signals[:] = [self._interrupts.raise_late]
                stack.callback(late_signals.clear)
                stack.push(self._stop_when_finished)
                self._stoppable = True
                self._open(self.folder, stack)
                self._stoppable = False
            every, shown = self._config.logging_steps, self._config.progress
            progress = Progress(self._name, self._steps, start=self._start, every=every, shown=shown)
            self._progress = stack.enter_context(progress)
            self._system = SystemMetrics(self._trained[0] if self._trained else None)
            self._stack = stack.pop_all()
        return self

    def _open(self, folder: Path, stack: ExitStack) -> None:
        """Locks the folder and restores the run from the newest checkpoint, if there is one."""
        on_first(lambda: self._claim(folder, stack))
        if self._checkpointer:
            self._start = self._saved = self._whole = self._checkpointer.load(
                self._config.resume_weights_only, self._config.resume_changed_functions
            )
            self._best.check_kept()
            self._checkpointer.mark()
        rows = on_first(lambda: self._open_log(folder, stack))
        values = [{key: value for key, value in row.items() if not is_of_machine(key)} for row in rows]
        if rows and rows[0]["step"] == 0:
            self.initial = values.pop(0)
        self.history = values

    def _claim(self, folder: Path, stack: ExitStack) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        check_run_dir(self._config)
        sweep(folder, "checkpoint-*")
        sweep(folder, "best-*")
        if self._checkpointer:
            needed = self._checkpointer.checkpoint_bytes + self._checkpointer.model_bytes
            needed += self._checkpointer.model_bytes * self._best.keeps_weights
            check_room(folder, needed, "output_dir: the model with one checkpoint")

    def _open_log(self, folder: Path, stack: ExitStack) -> list[dict[str, Any]]:
        """Opens the log and returns its rows up to the checkpoint."""
        config = self._config
        # config.yaml marks the folder as a run, so it is written after the reporters have started, which may fail.
        logged = self._start - len(self._unlogged.rows) if self._start else -1
        writer = MetricsWriter(
            folder, config.report_to, config.run_name or None, as_given(config), logged, self._unlogged.unwritten
        )
        self._writer = stack.enter_context(writer)
        rows = read_metrics(folder / "metrics.jsonl")
        first = 0 if config.eval_on_start else 1
        if self._start and [row["step"] for row in rows] != list(range(first, logged + 1)):
            raise ValueError(
                f"{str(folder / 'metrics.jsonl')!r} does not hold the steps {first} to {logged} of the run that "
                "is to be resumed; restore the file"
            )
        create_output_dir(config.output_dir, config)
        return rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error if isinstance(error, Exception) else None
        if isinstance(error, SystemExit):
            failed = RuntimeError(f"a function that the run calls has called sys.exit({error.code!r})")
        self._stoppable = False
        try:
            if isinstance(error, Interrupted) and not error.when and self._checkpointer:
                failed = self._stop(error, self._checkpointer)
            if failed and self._checkpointer and self._trained and failed_together(failed, len(self.history)):
                save = partial(self._save, self._checkpointer, self._whole, wait=False)
                rescue(failed, self._checkpointer, self._trained, step=self._whole, saved=self._saved, save=save)
        finally:
            self._callbacks.close()
            self._stack.__exit__(kind, error, trace)
        if failed and failed is not error:
            raise failed from error
        if error is None and self._finished and self.folder:
            folder = self.folder
            on_first(lambda: push(self._config, folder))

    def _stop(self, stop: Interrupted, checkpointer: Checkpointer) -> Exception | None:
        """Saves the last whole step, if it is not saved yet, and describes in `stop.when` what was saved. Returns the
        error if saving fails."""
        step = self._whole
        if not step:
            stop.when = "before the first step was complete; nothing is saved"
            return None
        try:
            if step > self._saved:
                checkpointer.back_to_mark()
            saved = self._save(checkpointer, step)
        except Exception as error:
            return error
        if self._unlogged.rows:
            stop.when = f"in the evaluation after step {step}, saved as {saved}"
        elif self._begun <= step:
            stop.when = f"after step {step}, saved as {saved}"
        else:
            stop.when = f"in step {step + 1}; step {step} is saved as {saved}"
        return None

    def _stop_when_finished(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises Interrupted if a stop was requested while a run finished. Every rank must call it after a run without
        an error."""
        if kind is None and (pending := self._asked_to_stop()):
            raise Interrupted(pending, f"after the last step; the trained model is in {self.folder}", finished=True)

    def remaining(self, batches: Iterable[list[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yields (step, batch) from the step at which the run starts or resumes. With `eval_on_start`, a new run first
        evaluates and logs the result as step 0. A resumed run first completes a step whose evaluation was interrupted.
        """
        self.between_parts()
        self._callbacks.call("on_start", self._start, {})
        if self._config.eval_on_start and self._start == 0 and self._evaluate:
            self._stoppable = True
            self.initial = dict(self._evaluate())
            self._stoppable = False
            self._compare(0, self.initial)
            self._callbacks.call("on_evaluate", 0, self.initial)
            if self._writer:
                self._writer.log(0, self.initial)
            self._progress.evaluation(0, self.initial)
        for step, metrics, shown, samples in list(self._unlogged.rows):
            self.log(step, metrics, shown, samples)
        for step, batch in enumerate(batches):
            if self._ended:
                return
            if step >= self._start:
                self._begun, self._stoppable = step + 1, True
                yield step, batch
                self._stoppable = False

    def parts(self, micros: Iterable[T]) -> Iterator[T]:
        """Yields the micro-batches of a step and lets the run stop between them. Every rank must have equally many."""
        for micro in micros:
            self.between_parts()
            yield micro

    def between_parts(self, resumable: bool = False) -> None:
        """After a stop request, raises Interrupted if no weight has changed since the last whole step or if the run is
        `resumable` here. Every rank must call it."""
        if self._checkpointer and (pending := self._asked_to_stop()):
            if resumable and self._whole > self._saved:
                self._checkpointer.mark()
            if resumable or self._checkpointer.is_at_mark:
                raise Interrupted(pending)

    def log(
        self, step: int, metrics: Mapping[str, float], shown: str = "loss", samples: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Ends a step: evaluates if an evaluation is due, writes a row of metrics and the samples, and saves a
        checkpoint if one is due. `shown` is the metric that the progress shows.

        Raises Interrupted after a stop request, except after the last step: the final model is saved next, and no
        checkpoint is needed.
        """
        self._whole, row = step, dict(metrics)
        due = self._evaluate is not None and self.due(step - 1, self._config.eval_steps)
        if due or self._callbacks:
            measured = self._watched((step, dict(row), shown, list(samples)), due)
            self._final = measured or self._final
            row |= measured
        self._stoppable = False
        self.history.append(row)
        if self._writer:
            self._writer.samples(step, list(samples))
            self._writer.log(step, row | self._system.step(row.get("num_tokens", 0.0)))
        self._progress.step(step, row, shown)
        if self._checkpointer:
            self._checkpointer.mark()
            asked = self._callbacks.takes("save")
            if step < self._steps and not self._ended:
                if asked or (self._config.save_steps and step % self._config.save_steps == 0):
                    self._save(self._checkpointer, step)
                    self._callbacks.call("on_save", step, row)
                    self._checkpointer.mark()
                if pending := self._asked_to_stop():
                    raise Interrupted(pending)

    @property
    def _ended(self) -> bool:
        """Whether the run ends before its last step."""
        return self._best.stopped or self._callbacks.stopped

    def _watched(self, row: Row, due: bool) -> dict[str, float]:
        """Calls callbacks after a step; evaluates if this is `due` or if a callback asks for it, and returns the
        metrics. If any of this is interrupted or fails, the checkpoint holds the row of the step, which is not in the
        log yet, and a resumed run does all of it again."""
        step, metrics, *_ = row
        self._unlogged.rows = [row]
        if self._checkpointer:
            self._checkpointer.mark()
        self._callbacks.call("on_step", step, metrics)
        asked, measured = self._callbacks.takes("evaluate"), dict[str, float]()
        if self._evaluate and (due or asked or self._callbacks.stopped):
            self._stoppable = True
            self.between_parts()
            measured = dict(self._evaluate())
            self._stoppable = False
            self._compare(step, measured)
            self._callbacks.call("on_evaluate", step, {**metrics, **measured})
        self._unlogged.rows = []
        return measured

    def _compare(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compares an evaluation with the earlier ones and keeps the weights if it is the best."""
        if self._best.seen(step, metrics) and self._best.keeps_weights and self._checkpointer:
            self._with_room(self._checkpointer, self._best.save, self._checkpointer.model_bytes, "the best model")

    def _may_unwind(self) -> bool:
        """Returns whether a signal that arrives now may end the run at once (see the docstring of the class)."""
        return self._stoppable and self._checkpointer is not None and self._checkpointer.is_at_mark and may_unwind()

    def _asked_to_stop(self) -> int:
        """Returns the stop signal that any rank has received, 0 if none. Ranks may receive it in different steps."""
        return max(from_all(self._interrupts.pending or 0))

    def _save(self, checkpointer: Checkpointer, step: int, wait: bool = True) -> Path:
        def write() -> None:
            self._unlogged.unwritten = self._writer.flush() if self._writer else {}
            checkpointer.save(step, self._config.save_total_limit)

        if step > self._saved:
            self._with_room(checkpointer, write, checkpointer.checkpoint_bytes, checkpointer.path(step).name, wait)
            self._saved = step
            self._best.checkpoint_saved()
        return checkpointer.path(step)

    def _with_room(
        self, checkpointer: Checkpointer, write: Callable[[], None], needed: int, what: str, wait: bool = True
    ) -> None:
        """Calls `write`, which writes `needed` bytes. If the disk is full, waits and deletes old checkpoints."""
        with_room(
            write,
            folder=checkpointer.folder,
            needed=needed,
            what=what,
            minutes=self._config.disk_wait_minutes if wait else 0,
            make_room=lambda: checkpointer.drop_oldest(self._config.save_total_limit),
        )

    def due(self, step: int, every: int) -> bool:
        """Returns True after the last step and, if `every` is not 0, after every `every` steps."""
        return step + 1 == self._steps or (every > 0 and (step + 1) % every == 0)

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        value_model: PreTrainedModel | None = None,
        dpo_model: PreTrainedModel | None = None,
    ) -> TrainResult:
        """Saves the trained models, with adapters merged, and returns them with the metrics of the last evaluation.
        With `load_best_model_at_end` weights and metrics are those of the best evaluation. A run that was resumed after
        its last step reads the metrics from its log. The models are saved even if the log cannot be written."""
        best = self._best.restore()
        if self._writer and self._writer.flush():
            log.warning("the last rows of the log are missing; the model is saved all the same")
        last = self.history[-1] if self.history else {}
        final = best or self._final or {name: x for name, x in last.items() if name.startswith("eval_")}
        best_step = self._best.step if best else None
        card = card_of(self._config, self._data, final, last, self._whole, best_step)
        accept = acceptance_of(self._config, self._data)
        models, saved = {"value_model": value_model, "dpo_model": dpo_model, "": model}, dict[str, PreTrainedModel]()
        write = partial(save_all, models, tokenizer, self.folder, saved, accept, card)
        if self._checkpointer:
            self._with_room(self._checkpointer, write, self._checkpointer.model_bytes, "the model")
            self._best.discard()
            self._checkpointer = None  # the run is finished: an error of a callback saves nothing
        else:
            write()
        if self.folder:
            passes = self.folder / PASSES
            on_first(lambda: shutil.rmtree(passes, ignore_errors=True))
        self._finished = True
        self._callbacks.call("on_end", self._whole, final)
        return TrainResult(
            model=saved[""],
            tokenizer=tokenizer,
            history=self.history,
            final=final,
            output_dir=self.folder,
            initial=self.initial,
            value_model=saved.get("value_model"),
            dpo_model=saved.get("dpo_model"),
        )
