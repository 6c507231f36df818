"""Measures time, memory and error of implementations that compute log-probs and losses from hidden states.

Our ops are first compared with float64 on small cases. If an op fails this check, its row holds the reason of the
failure instead of times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.beside import Beside, commit_of
from bench.measure import Step, Tensors, excess, interleave, largest_error, peak_extra_bytes, relative_error, run
from bench.problems import FLOORS, TASKS, Case, make_problem
from bench.providers import PROVIDERS, Provider
from bench.results import RESULTS, append_row, device_name

SHAPES = ((8192, 4096, 128256), (16384, 2048, 151936), (4096, 896, 151936))
CPU_SHAPE = (2048, 512, 50257)
ALONE = Case(1 << 20, 1, 1)  # for ops that take log-probs and no hidden states
# V below and above the vocabulary share of one forward program
CHECKED = (Case(65, 64, 1003, dead=0.5), Case(130, 128, 5003))
NOT_INSTALLED = "not installed"
NOT_IN_BUILD = "not in this build"
ERRORS = ("logprob_error", "entropy_error", "hidden_grad_error", "weight_grad_error")
COLUMNS = {  # key of a row -> heading and format in the table
    "forward_ms": ("forward ms", ".2f"),
    "backward_ms": ("backward ms", ".2f"),
    "total_ms": ("total ms [20, 80 %]", ".2f"),
    "percent_of_floor": ("% of floor", ".0f"),
    "peak_extra_mb": ("extra MB", ".1f"),
    **dict(zip(ERRORS, (("logprob", ".1e"), ("entropy", ".1e"), ("dX", ".1e"), ("dW", ".1e")), strict=True)),
}
LEGEND = """\
Times are medians of interleaved runs; on a GPU the L2 cache is overwritten before each run. "% of floor" is the time of
the 4 bare matrix products over all rows (logits, logits again, dX, dW), divided by the total time; for ops that only
take log-probs it is the time to copy as many bytes. It exceeds 100 if an op skips products or rows. "extra" is the peak
memory beyond inputs and returned gradients. Errors are relative to float64: the largest error of logprob (or kl) and of
entropy, in nats, and |d - d64| / |d64| of the gradients."""

Row = dict[str, Any]


def all_cases(shapes: Sequence[Sequence[int]], peaked: Sequence[int], dead: Sequence[float]) -> list[Case]:
    """Returns every combination of shape, peakedness and fraction of dead rows, and one case for ops on log-probs."""
    return [ALONE, *(Case(t, d, v, bool(p), share) for p in peaked for share in dead for t, d, v in shapes)]


def competing(case: Case, providers: Sequence[Provider]) -> list[Provider]:
    """Returns the implementations to measure in this case; none if all of them would be hardware floors."""
    found = [p for p in providers if p.asked.alone == case.alone]
    return found if {p.task for p in found} - set(FLOORS) else []


def run_kernels(
    device: torch.device,
    cases: Sequence[Case],
    providers: Sequence[Provider] = PROVIDERS,
    runs: int = 20,
    seconds: float = math.inf,
    folder: Path = RESULTS,
    beside: Path | None = None,
) -> list[str]:
    """Measures all cases: prints a table and appends rows after each. Returns the faults of our ops.

    Our ops of the checkout `beside` are measured in the same rounds; their rows have "ours, COMMIT" as provider.
    Runs in bfloat16 on a GPU and float32 on a CPU. `seconds` limits the time per implementation and case.
    """
    print(LEGEND, flush=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    faults = {}
    for provider in (p for p in providers if p.ours and any(p in competing(case, providers) for case in cases)):
        try:
            faults[provider] = fault(provider, dtype, device)
        except Exception as error:
            faults[provider] = _reason(error, device)
    for case in cases:
        if here := competing(case, providers):
            old = [of_other_build(p, beside) for p in here if p.ours] if beside else []
            rows = measure_case(case, here, faults, dtype, device, runs, seconds, beside)
            print("\n" + table(rows, [case], [*here, *old]), flush=True)
            for row in rows:
                if row["error"] not in (NOT_INSTALLED, NOT_IN_BUILD):
                    append_row(row, folder)
    return [f"{p.task}, {p.name}: {reason}" for p, reason in faults.items() if reason]


def fault(provider: Provider, dtype: torch.dtype, device: torch.device) -> str:
    """Describes the first result that is less accurate than plain torch in the same dtype; "" if there is none."""
    task = provider.asked
    for case in CHECKED:
        problem = make_problem(case, dtype, device)
        truth = run(task.step(task.reference, problem.double()))
        plain = run(task.step(task.reference, problem))
        found = run(task.step(provider.function, problem))
        for kind, *triples in zip(("output", "gradient"), found, plain, truth, strict=True):
            for i, tensors in enumerate(zip(*triples, strict=True)):
                if reason := excess(*(tensor.detach() for tensor in tensors)):
                    return f"{kind} {i} at {case}: {reason}"
    return ""


def measure_case(
    case: Case,
    providers: Sequence[Provider],
    faults: Mapping[Provider, str],
    dtype: torch.dtype,
    device: torch.device,
    runs: int,
    seconds: float,
    beside: Path | None = None,
) -> list[Row]:
    """Measures all implementations of a case, alternating; returns a row for each.

    The row of an implementation that fails holds the reason instead of numbers.
    """
    problem = make_problem(case, dtype, device)
    rows: dict[Provider, Row] = {}
    steps: dict[Provider, Step | Callable[[], tuple[float, float]]] = {}
    for name, group in groupby(providers, key=lambda provider: provider.task):
        task = TASKS[name]
        truth = task.truth(problem) if task.by_row else None
        for provider in group:
            row = rows[provider] = {"bench": "kernels", **_key(case, provider), **dict.fromkeys(COLUMNS)}
            row |= {"device": device_name(device.type), "dtype": str(dtype).removeprefix("torch.")}
            row["error"] = NOT_INSTALLED if provider.missing else faults.get(provider, "")
            if row["error"]:
                continue
            step = task.step(provider.function, problem)
            try:
                run(step)  # the first call compiles and autotunes; its results may be wrong
                extra, outputs, gradients = peak_extra_bytes(step, device)
                row |= {"peak_extra_mb": extra / 1e6} | ({} if truth is None else _errors(outputs, gradients, *truth))
                steps[provider] = step
            except Exception as error:
                row["error"] = _reason(error, device)
    with ExitStack() as processes:
        for provider in [p for p in steps if p.ours and beside]:
            assert beside is not None
            old = of_other_build(provider, beside)
            row = rows[old] = rows[provider] | _key(case, old) | dict.fromkeys(COLUMNS)
            name = str(dtype).removeprefix("torch.")
            asked = (case, provider.task, provider.name, name, device.type, torch.get_num_threads())
            step = processes.enter_context(Beside(beside, *asked))
            if step.extra_bytes is None:
                row["error"] = NOT_IN_BUILD
            else:
                row["peak_extra_mb"], steps[old] = step.extra_bytes / 1e6, step
        for provider, times in interleave(steps, device, runs, seconds).items():
            rows[provider] |= {"error": _reason(times, device)} if isinstance(times, Exception) else times
    floors = [row["total_ms"] for provider, row in rows.items() if provider.task in FLOORS]
    for provider, row in rows.items():
        if provider.asked.given_logits and row["total_ms"]:  # logits are read twice and their gradient is written once
            row["gb_per_s"] = 3 * dtype.itemsize * case.rows * case.vocab / row["total_ms"] / 1e6
        elif floors and floors[-1] and row["total_ms"]:
            share = provider.asked.row_bytes / TASKS["copy"].row_bytes if case.alone else 1.0
            row["percent_of_floor"] = 100 * share * floors[-1] / row["total_ms"]
            row["gb_per_s"] = provider.asked.row_bytes * case.rows / row["total_ms"] / 1e6
    return [*rows.values()]


def of_other_build(provider: Provider, folder: Path) -> Provider:
    """Returns the entry of an implementation of the checkout in `folder`."""
    return replace(provider, name=f"{provider.name}, {commit_of(folder)}")


def _errors(outputs: Tensors, gradients: Tensors, true_outputs: list[Tensor], true_gradients: list[Tensor]) -> Row:
    """Returns the errors of outputs and gradients relative to float64, under the names in ERRORS that apply to the
    task."""
    found: Row = dict(zip(ERRORS[:2], map(largest_error, outputs, true_outputs), strict=False))
    found |= dict(zip(ERRORS[2:], map(relative_error, gradients, true_gradients), strict=False))
    if not all(map(math.isfinite, found.values())):
        raise ArithmeticError(f"not finite: {found}")
    return found


def _reason(error: Exception, device: torch.device) -> str:
    """Describes an exception in one line.

    Raises it again if an illegal memory access has broken the GPU, because later measurements would be invalid.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {error}".split("\n")[0][:160]


def _key(case: Case, provider: Provider) -> Row:
    return {"provider": provider.name, "task": provider.task, **case._asdict()}


def read_rows(file: Path) -> list[Row]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["bench"] == "kernels"]


def table(rows: Sequence[Row], cases: Sequence[Case], providers: Sequence[Provider] = PROVIDERS) -> str:
    """Formats the newest row of every implementation and case as Markdown; "not measured yet" if there is no row."""
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = []
    for case in cases:
        lines += [f"### {case}", "", f"| | | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
        for provider in competing(case, providers):
            key = _key(case, provider)
            found = [row for row in rows if key.items() <= row.items()]
            cells = _cells(found[-1]) if found else ["not measured yet"]
            cells += [""] * (len(headings) - len(cells))
            lines.append(f"| {provider.task} | {provider.name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _cells(row: Row) -> list[str]:
    if row["error"]:
        return [row["error"].replace("|", "/")]
    cells = ["" if row[name] is None else f"{row[name]:{form}}" for name, (_, form) in COLUMNS.items()]
    cells[2] += f" [{row['total_ms_20']:.2f}, {row['total_ms_80']:.2f}]"
    cells[3] = f"{cells[3]} ({row['gb_per_s']:.0f} GB/s)".strip() if row.get("gb_per_s") else cells[3]
    return cells
