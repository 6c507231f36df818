"""Runs our trainer or TRL's once and records the time and the loss of each step, and the memory peak."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from bench.measure import now
from bench.train.tasks import Row, Task
from fastrlhf.config import TrainConfig
from fastrlhf.models.loading import DTYPES
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import Example


@dataclass(frozen=True, kw_only=True)
class Run:
    seconds: list[float]
    """Seconds of each step except the first, measured from the end of the previous step. On a CPU these are CPU
    seconds."""
    losses: list[float]
    """Loss of every step."""
    peak_mb: float | None
    """Peak GPU memory (weights included) beyond earlier allocations, in MB; None on a CPU."""


def run_ours(task: Task, config: TrainConfig, examples: Sequence[Example]) -> Run:
    with _measured(config.device) as measured, _after_steps_of_ours(measured.mark):
        history = task.train(config, examples).history
    return measured.run([row["loss"] for row in history])


def run_trl(task: Task, ours: TrainConfig, rows: Sequence[Row], batch_size: int, settings: Mapping[str, Any]) -> Run:
    """Runs TRL's trainer on the model and tokenizer in the model folder of `ours`; `rows` are the data of all steps.

    TRL runs with the fastest settings that do not change what it computes. bfloat16 weights are updated in place (our
    trainer, and TRL with autocast, keep float32 copies), nothing is recomputed in the backward, and attention is
    flash-attn's if it is installed. Both trainers log every step.
    """
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset

    base, config = getattr(trl, f"{task.trl}Trainer"), getattr(trl, f"{task.trl}Config")

    class Trainer(base):
        """TRL's trainer without its tokenisation, because rows already contain token ids."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    folder, device = ours.model_name_or_path, ours.device
    kind = AutoModelForSequenceClassification if task.is_classifier else AutoModelForCausalLM
    attention = "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    with tempfile.TemporaryDirectory() as out, _measured(device) as measured:

        class StepEnds(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                measured.mark()

        trainer = Trainer(
            model=kind.from_pretrained(folder, dtype=DTYPES[ours.dtype], attn_implementation=attention),
            args=config(
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=ours.batch_size // batch_size, learning_rate=ours.learning_rate,
                max_length=None, logging_steps=1, report_to=[], gradient_checkpointing=False, use_cpu=device == "cpu",
                bf16=False, disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential",
                dataloader_pin_memory=device == "cuda", **task.trl_settings(batch_size), **settings,
            ),
            train_dataset=Dataset.from_list([*rows]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[StepEnds()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return measured.run([log["loss"] for log in trainer.state.log_history if "loss" in log])


class _Measured:
    def __init__(self, device: str) -> None:
        self.device, self.ends = torch.device(device), []
        self.peak_mb: float | None = None

    def mark(self) -> None:
        self.ends.append(now(self.device))

    def run(self, losses: Sequence[float]) -> Run:
        seconds = [after - before for before, after in pairwise(self.ends)]
        return Run(seconds=seconds, losses=[float(loss) for loss in losses], peak_mb=self.peak_mb)


@contextmanager
def _measured(device: str) -> Iterator[_Measured]:
    measured, before = _Measured(device), 0
    if device == "cuda":
        gc.collect()  # trainers hold reference cycles, so their memory is not freed at once
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield measured
    if device == "cuda":
        measured.peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6


@contextmanager
def _after_steps_of_ours(mark: Callable[[], None]) -> Iterator[None]:
    """Makes our trainer call `mark` after every step, to record the time."""
    step = Optimizer.step

    def marked(self: Optimizer) -> dict[str, float]:
        metrics = step(self)
        mark()
        return metrics

    Optimizer.step = marked
    try:
        yield
    finally:
        Optimizer.step = step
