"""Shows the progress of a run on standard error: a bar on a terminal; otherwise (a pipe, a log file, a notebook) a line
after the first step, after every `logging_steps` and after the last:

    sft 20/94: loss 0.6512, learning_rate 1.6e-05, grad_norm 1.24, 4.52k tokens/s, ETA 01:23

The loss (in on-policy runs the score) is the mean over the steps since the previous line; learning rate and gradient
norm are those of the step. Tokens per second and the time left include evaluations and checkpoints. With `progress:
false` there is neither a bar nor these lines. Evaluations are always printed, as separate lines:

    sft 20/94: eval_loss 0.6634

In several processes only rank 0 prints.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

from fastrlhf.distributed.ranks import is_first

T = TypeVar("T")

PASS_INTERVAL = 10.0
"""Seconds between two lines of a pass over the data."""


class Progress:
    """Shows the progress of a run of `total` steps, the first `start` of which were done before: `with Progress("sft",
    94) as progress`.

    `every` is `logging_steps`. If `shown` is false, only evaluations are printed.
    """

    def __init__(self, name: str, total: int, *, start: int = 0, every: int = 10, shown: bool = True) -> None:
        self._name, self._total, self._start, self._every = name, total, start, every
        self._lines = shown and is_first() and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=name,
            disable=not (shown and is_first() and sys.stderr.isatty()),
            file=sys.stderr,
            dynamic_ncols=True,
        )
        self._began = self._last = time.monotonic()
        self._values: list[float] = []
        self._tokens = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, step: int, metrics: Mapping[str, float], shown: str = "loss") -> None:
        """Counts a step; the first one is 1. `metrics` are the metrics of its row in the log, and `shown` is the name
        of its loss or score."""
        self._bar.update()
        self._bar.set_postfix_str(f"{shown.rpartition('/')[2]} {metrics[shown]:.4g}")
        self._values.append(metrics[shown])
        self._tokens += metrics.get("num_tokens", 0.0)
        if self._lines and (step in (self._start + 1, self._total) or step % self._every == 0):
            self._write(step, self._line(step, metrics, shown))
        self.evaluation(step, {name: value for name, value in metrics.items() if name.startswith("eval_")})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the metrics of an evaluation after step `step`; nothing if `metrics` is empty."""
        if metrics and is_first():
            self._write(step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _line(self, step: int, metrics: Mapping[str, float], shown: str) -> str:
        now = time.monotonic()
        parts = [f"{shown} {sum(self._values) / len(self._values):.4g}"]
        parts += [f"{name} {metrics[name]:.3g}" for name in ("learning_rate", "grad_norm") if name in metrics]
        parts.append(f"{tqdm.format_sizeof(self._tokens / max(now - self._last, 1e-9))} tokens/s")
        parts.append(f"ETA {_left(now - self._began, step - self._start, self._total - step)}")
        self._last, self._tokens = now, 0.0
        self._values.clear()
        return ", ".join(parts)

    def _write(self, step: int, text: str) -> None:
        self._bar.write(f"{self._name} {step}/{self._total}: {text}", file=sys.stderr)
        sys.stderr.flush()


def watched(parts: Sequence[T], sizes: Iterable[int], title: str, unit: str = "examples") -> Iterator[T]:
    """Iterates over the parts of a pass over data, each with its number of units, and shows progress: a bar on a
    terminal; otherwise a line every ten seconds and one at the end. With an empty title nothing is shown.

        reference: 5120 of 60000 examples, ETA 02:31
        reference: 60000 examples in 02:46
    """
    sizes = list(sizes)
    total, done, shown = sum(sizes), 0, bool(title) and is_first()
    lines = shown and not sys.stderr.isatty()
    began = last = time.monotonic()
    with tqdm(total=total, desc=title, unit=unit[:-1], disable=lines or not shown, file=sys.stderr) as bar:
        for part, size in zip(parts, sizes, strict=True):
            yield part
            done += size
            bar.update(size)
            now = time.monotonic()
            if lines and done < total and now - last >= PASS_INTERVAL:
                last = now
                left = _left(now - began, done, total - done)
                tqdm.write(f"{title}: {done} of {total} {unit}, ETA {left}", file=sys.stderr)
    if lines:
        spent = tqdm.format_interval(time.monotonic() - began)
        tqdm.write(f"{title}: {total} {unit} in {spent}", file=sys.stderr)


def _left(seconds: float, done: int, remaining: int) -> str:
    return tqdm.format_interval(seconds / done * remaining)
