"""Writes the records of a run while it trains: metrics.jsonl, samples.jsonl, and the services of `report_to`.

    with MetricsWriter(output_dir, report_to=["tensorboard"]) as writer:
        writer.log(1, {"loss": 0.693, "rewards/margins": 0.0})
        writer.samples(1, [{"prompt": "...", "response": "...", "score": 0.5}])

metrics.jsonl holds one strict JSON object per call of `log`, flushed at once:

    {"step": 1, "time": 0.42, "loss": 0.693, "rewards/margins": 0.0}

`step` counts optimiser steps; step 0 is the evaluation before the first step (`eval_on_start`); `time` is seconds since
the writer was made. JSON has no number for NaN and the infinities: they are written as the strings "nan", "inf" and
"-inf", and `read_metrics` turns them back into floats. A resumed run drops the rows after its checkpoint and appends
new ones, so that its log equals the log of an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

from fastrlhf.runtime.reporters import Reporter, import_reporters, start_reporters

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics and samples of one run, and sends the metrics to reporters.

    If a row cannot be written, for example because the disk is full, a warning is given, and the row is kept in memory
    and written before the next row. `flush` is called before every checkpoint; the checkpoint stores the rows that are
    still unwritten. A reporter that fails after the start is dropped with one warning. Steps that a service already has
    are not sent again by a resumed run, unless the service replaces them.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: Sequence[str] = (),
        run_name: str | None = None,
        config: dict[str, Any] | None = None,
        resumed_at: int | None = None,
        unwritten: Mapping[str, str] | None = None,
    ):
        """Opens the files and starts the reporters.

        Args:
            output_dir: directory of the run, created if it does not exist; existing files are appended to.
            report_to: names of services (`REPORTERS`); or "none"; or "all", every service whose package is installed.
            run_name: name of the run at the services; the directory's name by default.
            config: the resolved configuration, shown by the reporters.
            resumed_at: last step of the checkpoint that the run resumes from: rows of later steps are dropped, and
                `time` continues from the last row that is kept. -1: the run starts again, and all rows are dropped.
                None: existing rows are kept.
            unwritten: result of an earlier `flush`; these lines are written first.

        Raises:
            ValueError: a reporter is unknown, its package is not installed, or it cannot start; no file of the log has
                been changed then.
        """
        modules = import_reporters(report_to)
        directory = Path(output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        next_step = resumed_at + 1 if resumed_at is not None and resumed_at >= 0 else None
        self._reporters: dict[str, Reporter] = start_reporters(
            modules, directory, run_name or directory.resolve().name, config or {}, next_step
        )
        self._sent = _last_step(directory / "metrics.jsonl") if next_step is not None else -1
        """The last step that the services already have."""
        if resumed_at is not None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _drop_rows_after(directory / name, resumed_at)
        self._files = {name: _Lines(directory / name) for name in ("metrics.jsonl", "samples.jsonl")}
        self._metrics, self._samples = self._files.values()
        for name, rows in (unwritten or {}).items():
            self._files[name].add(rows)
        self._start = time.monotonic() - _last_time(directory / "metrics.jsonl", resumed_at)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends the metrics of one optimiser step, in the given order. Values may be 0-dim tensors.

        Raises ValueError if a metric is called "step" or "time".
        """
        for name in ("step", "time"):
            if name in metrics:
                raise ValueError(f"metric {name!r} has the name of a column of metrics.jsonl; call it something else")
        numbers = {name: _number(value) for name, value in metrics.items()}
        seconds = round(time.monotonic() - self._start, 3)
        self._metrics.append({"step": step, "time": seconds, **numbers})
        for name in list(self._reporters):
            if step > self._sent or self._reporters[name].replaces:
                self._attempt(name, lambda reporter: reporter.log(step, numbers))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends samples of the policy at `step`, one row per sample: prompt, response, score and others."""
        for row in rows:
            self._samples.append({"step": step, **row})

    def flush(self) -> dict[str, str]:
        """Waits until the rows are on the disk. Returns file name -> all lines that could not be written, each in
        full."""
        return {name: rows for name, file in self._files.items() if (rows := file.flush())}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        for name in list(self._reporters):
            self._attempt(name, lambda reporter: reporter.close(failed=kind is not None))
        self._reporters.clear()

    def _attempt(self, name: str, action: Any) -> None:
        try:
            action(self._reporters[name])
        except Exception as error:  # third-party code that uses the network: the run continues after every error
            del self._reporters[name]
            warnings.warn(
                f"{name} failed and receives no more metrics of this run: {error!r}", RuntimeWarning, stacklevel=3
            )


class _Lines:
    """A JSON-lines file to which complete lines are appended. A line that cannot be written is kept and written
    later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _complete(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._unwritten, self._done = b"", 0
        """Whole lines, and how many of their bytes are in the file."""

    def append(self, row: Mapping[str, Any]) -> None:
        # A lone surrogate cannot be UTF-8; its backslash form is the JSON escape of the same character.
        self.add(json.dumps(_strict(row), ensure_ascii=False, allow_nan=False) + "\n")

    def add(self, lines: str) -> None:
        failed_before = bool(self._unwritten)
        self._unwritten += lines.encode("utf-8", errors="backslashreplace")
        try:
            self._write()
        except OSError as error:
            if not failed_before:
                message = f"{self._path}: a row cannot be written ({error}); it is kept and written later"
                warnings.warn(message, RuntimeWarning, stacklevel=4)

    def flush(self) -> str:
        """Writes all lines to the disk. Returns those that cannot be written. The first of them may be partly in the
        file already, but is returned whole, because a resumed run removes an incomplete last line."""
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            lines = self._unwritten[self._unwritten.rfind(b"\n", 0, self._done) + 1 :]
            log.warning("%s cannot be written: %s", self._path, error.strerror)
            return lines.decode()
        return ""

    def close(self) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()

    def _write(self) -> None:
        while self._done < len(self._unwritten):
            self._done += self._file.write(self._unwritten[self._done :])
        self._unwritten, self._done = b"", 0


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSON-lines file of a run, without an incomplete last line of a killed run.

    Raises ValueError, naming file, line and fix, if a line is not a JSON object in UTF-8.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if (row := _parsed(path, number, line)) is None:
                break
            rows.append(row)
    return rows


def _parsed(path: str | Path, number: int, line: bytes) -> dict[str, Any] | None:
    """Parses the JSON object of a line; returns None for an incomplete line."""
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
        if not line.endswith(b"\n"):
            return None
        raise ValueError(f"{path}, line {number}: not JSON ({error}); fix or delete the line") from error
    if not isinstance(row, dict):
        text = line.decode("utf-8", "replace").strip()[:40]
        raise ValueError(f"{path}, line {number}: expected a JSON object, found {text!r}; fix or delete the line")
    return row


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics.jsonl, in order, and converts "nan", "inf" and "-inf" to floats.

    Raises ValueError as `read_rows` does.
    """
    return [
        {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in row.items()}
        for row in read_rows(path)
    ]


def _complete(path: Path) -> None:
    """Removes an incomplete last line of a killed run, and adds a missing line end to a complete one."""
    if path.exists():
        with open(path, "rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if _is_json(content[end:]):
                file.write(b"\n")
            else:
                file.truncate(end)


def _drop_rows_after(path: Path, step: int) -> None:
    """Truncates the file before the first row of a step after `step`; the rows are in the order of their steps. With
    `step` -1 all rows are removed, including damaged ones. Raises ValueError, naming file, line and fix, if a line to
    keep is damaged."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        kept = 0
        for number, line in enumerate(file, start=1):
            if step < 0 or not line.endswith(b"\n"):
                break
            row = _parsed(path, number, line) or {}
            if not isinstance(row.get("step"), int):
                raise ValueError(f"{path}, line {number}: the row has no step; fix or delete the line")
            if row["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def _last_step(path: Path) -> int:
    """Returns the step of the last complete row; -1 if there is none."""
    for line in reversed(path.read_bytes().splitlines()) if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["step"])
    return -1


def _last_time(path: Path, resumed_at: int | None) -> float:
    rows = read_rows(path) if resumed_at is not None and path.exists() else []
    time = rows[-1].get("time") if rows else 0.0
    if not isinstance(time, int | float):
        raise ValueError(f"{path}, line {len(rows)}: the row has no time; fix the line")
    return time


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _number(value: Any) -> float:
    return value if type(value) in (int, float) else float(value)


def _strict(value: Any) -> Any:
    """Converts a value to JSON types: non-finite floats to strings, tensors and other scalars to floats."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else str(number)
