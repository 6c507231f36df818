"""Checks every causal language model type of the installed transformers, each in its own process.

The result of a type says whether its numbers are right, whether its sequences must run one at a time, or the message
with which the type is refused. Each type has a row in bench/results/models.jsonl. A type is skipped if its row contains
all checks for the installed version of transformers.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import transformers

from bench.models.checks import CHECKS, DifferenceError, quiet, run_checks
from bench.models.configs import causal_types
from bench.results import RESULTS, state_of_code

ROWS = RESULTS / "models.jsonl"
SECONDS = 180
"""Limit of the CPU time for one model type, in seconds."""

CELLS = {"right": "yes", "": "not run", "wrong": "no", "crashed": "no", "refused": "no"}
"""Verdict of a check -> text in the cell of the table."""

Row = dict[str, Any]


def run_models(types: Sequence[str], checks: Sequence[str], path: Path = ROWS, *, again: bool = False) -> str:
    """Checks the types that have no current row, writes their rows, and returns a summary of all rows."""
    rows = read_rows(path)
    names = list(checks) or list(CHECKS)
    import_module("peft")  # imports peft once, so that the processes of the types need not
    with quiet():
        for model_type in types or causal_types():
            old = rows.get(model_type, {})
            fresh = old.get("transformers") == transformers.__version__ and (
                {"refused", "crashed", "not built"} & {*old} or {*names} <= {*old["checks"]}
            )
            if again or not fresh:
                rows[model_type] = _in_process(model_type, names)
                print(line(rows[model_type]), flush=True)
                write_rows(rows, path)
    return summary(rows.values())


def read_rows(path: Path = ROWS) -> dict[str, Row]:
    """Reads the rows of a file as a dict by model type."""
    if not path.exists():
        return {}
    rows = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]
    return {row["model_type"]: row for row in rows}


def write_rows(rows: dict[str, Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(rows[key], sort_keys=True) + "\n" for key in sorted(rows))
    path.with_suffix(".partial").write_text(text, encoding="utf-8")
    path.with_suffix(".partial").replace(path)


def verdict(row: Row) -> str:
    """The verdict on a model type: "right", "refused", "crashed", "not built" or "wrong".

    right: every check passed; refused: this project raised its one-line error; crashed: another exception was raised;
    not built: transformers itself cannot make the tiny model; wrong: a number differs.
    """
    if "refused" in row:
        return "refused"
    for found in ("crashed", "not built"):
        if found in row:
            return found
    states = {check["verdict"] for check in row["checks"].values()}
    return next((found for found in ("wrong", "crashed", "refused") if found in states), "right")


def line(row: Row) -> str:
    found = verdict(row)
    text = row.get("refused") or row.get("crashed") or row.get("not built") or ""
    for name, check in row["checks"].items():
        if check["verdict"] != "right":
            text += f" [{name}: {check['verdict']}: {check['text']}]"
    way = "alone" if row.get("alone") else "packed"
    return f"{row['model_type']:28} {found:8} {way:6} {row['seconds']:5.1f}s {text}"


def summary(rows: Iterable[Row]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[verdict(row)] = counts.get(verdict(row), 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def page(rows: Iterable[Row]) -> str:
    """Formats the table of supported models in Markdown: type, how its packs run, which checks passed."""
    rows = sorted(rows, key=lambda row: row["model_type"])
    first = rows[0] if rows else {"torch": "", "transformers": ""}
    head = (
        f"Measured with transformers {first['transformers']} and torch {first['torch']} on tiny random models by "
        "`python -m bench models`: log-probs within 1e-5 nats and all gradients within 2e-5 of the plain model.\n\n"
        "| model_type | packs | training | shared prompts | checkpointing | sampling | reward model | LoRA |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(map(_markdown, rows))


def _markdown(row: Row) -> str:
    kind = f"`{row['model_type']}`"
    if text := row.get("not built"):
        text = f"transformers cannot build the tiny model ({text.replace('|', '/')})"
        return f"| {kind} | not tested: {text} | | | | | | |\n"
    if text := row.get("refused") or row.get("crashed"):
        return f"| {kind} | refused: {text.replace('|', '/')} | | | | | | |\n"
    way = "one sequence at a time" if row["alone"] else "together"
    cells = [CELLS[row["checks"].get(name, {}).get("verdict", "")] for name in CHECKS]
    return f"| {kind} | {way} | {' | '.join(cells)} |\n"


def _in_process(model_type: str, names: list[str]) -> Row:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    start = time.time()
    pid = os.fork()
    if pid == 0:
        receiver.close()
        _child(model_type, names, sender)
    sender.close()
    row: Row = {"model_type": model_type, "checks": {}}
    try:
        while True:
            name, value = receiver.recv()
            if name in ("alone", "refused", "crashed", "not built"):
                row[name] = value
            else:
                row["checks"][name] = value
    except EOFError:
        pass
    _, status, usage = os.wait4(pid, 0)
    if status:
        row["crashed"] = f"the process ended with {os.waitstatus_to_exitcode(status)}"
    row["seconds"] = round(min(usage.ru_utime + usage.ru_stime, time.time() - start), 1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return row | versions | state_of_code() | {"date": datetime.date.today().isoformat()}


def _child(model_type: str, names: list[str], sender: Any) -> None:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # a signal ends the process after SECONDS of CPU time
    torch.set_num_threads(1)
    for name, value in run_checks(model_type, names):
        if name in CHECKS:
            value = _told(value)
        elif isinstance(value, BaseException):
            value = _text(value)
        sender.send((name, value))
    sender.close()
    os._exit(0)


def _told(value: Any) -> Row:
    if isinstance(value, DifferenceError):
        return {"verdict": "wrong", "text": str(value)}
    if isinstance(value, ValueError):
        return {"verdict": "refused", "text": _text(value)}
    if isinstance(value, BaseException):
        return {"verdict": "crashed", "text": _text(value)}
    return {"verdict": "right", **{name: float(f"{error:.1e}") for name, error in value.items()}}


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400]
    text = re.sub(rf"{re.escape(gettempdir())}/\S+|'/[^']*'", "FOLDER", text)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
