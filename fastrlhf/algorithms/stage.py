"""What every trainer does around its loop: the folder, the data, the order, the log, the model that is left behind."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.checkpoint import check_output_dir, create_output_dir, save_trained
from fastrlhf.config import TrainConfig, require
from fastrlhf.metrics import MetricsWriter
from fastrlhf.types import TokenizedExample
from fastrlhf_kernels import Max, Metric, merge


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a trainer returns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, float]] = field(repr=False)
    """One row of metrics per optimiser step (per update, in on-policy runs)."""
    final: dict[str, float]
    """The last evaluation; empty where there was nothing to evaluate on."""
    output_dir: Path | None
    value_model: PreTrainedModel | None = None
    """The critic of an on-policy run."""


class Stage:
    """One run of one trainer: `with Stage("sft", config, num_steps, (model, tokenizer)) as stage`.

    A run that ends early, by an error or by Ctrl-C, leaves the weights of its last whole step in `interrupted/`.
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        steps: int,
        trained: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        self._name, self._config, self._steps, self._trained = name, config, steps, trained
        self._stack = ExitStack()
        self.history: list[dict[str, float]] = []
        self.folder = Path(config.output_dir) if config.output_dir else None

    def __enter__(self) -> Stage:
        config = self._config
        if self.folder:
            check_output_dir(config.output_dir)
            # config.yaml marks the folder as a run: it comes after the reporters, which may fail to start.
            writer = MetricsWriter(self.folder, config.report_to, config.run_name or None, dataclasses.asdict(config))
            self._writer = self._stack.enter_context(writer)
            create_output_dir(config.output_dir, config)
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._steps,
                desc=self._name,
                disable=not config.progress,
                file=sys.stderr,
                dynamic_ncols=True,
            )
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind and self.folder and self.history and self._trained:
            save_trained(*self._trained, self.folder / "interrupted")

    def log(self, step: int, metrics: Mapping[str, float], shown: str = "loss") -> None:
        """One row per optimiser step, at once on disk."""
        self.history.append(dict(metrics))
        if self.folder:
            self._writer.log(step, metrics)
        self._bar.update()
        self._bar.set_postfix_str(f"{shown.rpartition('/')[2]} {metrics[shown]:.4g}")

    def samples(self, step: int, rows: Sequence[dict[str, object]]) -> None:
        if self.folder:
            self._writer.samples(step, list(rows))

    def due(self, step: int, every: int) -> bool:
        """True after the last step, and every `every` steps where that is not 0."""
        return step + 1 == self._steps or (every > 0 and (step + 1) % every == 0)

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        final: dict[str, float],
        value_model: PreTrainedModel | None = None,
    ) -> TrainResult:
        """Saves what was trained, adapters added to the weights, and returns it."""
        if value_model is not None:
            save_trained(value_model, tokenizer, self.folder and self.folder / "value_model")
        save_trained(model, tokenizer, self.folder)
        return TrainResult(
            model=model,
            tokenizer=tokenizer,
            history=self.history,
            final=final,
            output_dir=self.folder,
            value_model=value_model,
        )


def check_micro_batch(config: TrainConfig, examples: Sequence[TokenizedExample], costs: Sequence[int]) -> None:
    """Raises ValueError, naming the row, where an item of `costs` tokens, one per example, exceeds a micro-batch."""
    longest = max(range(len(costs)), key=costs.__getitem__)
    require(
        costs[longest] <= config.micro_batch_tokens,
        "micro_batch_tokens",
        config.micro_batch_tokens,
        f"at least {costs[longest]}, the tokens of row {examples[longest].row}, or max_length lower",
    )


class StepMetrics:
    """Metrics of the losses, added up on the device over the micro-batches of a step (or the passes of an update)."""

    def __init__(self) -> None:
        self._totals: dict[str, Metric] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        self._totals = merge(self._totals, metrics)

    def means(self, count: str) -> dict[str, float]:
        """Every sum over the sum called `count`; maxima as they are. Waits for the GPU, once."""
        names = list(self._totals)
        values = dict(zip(names, torch.stack([self._totals[name].value for name in names]).tolist(), strict=True))
        number = max(values[count], 1.0)
        return {
            name: value if isinstance(self._totals[name], Max) else value / number for name, value in values.items()
        }
