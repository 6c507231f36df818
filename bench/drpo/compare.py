"""Runs the implementations of a DR-PO update alternately, each in its own process, and tabulates medians and ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench.drpo.contestants import PHASES
from bench.drpo.problem import Problem
from bench.results import RESULTS, append_row, device_name

ROOT = Path(__file__).parents[2]
MEASURED = ("seconds", *PHASES, "extra_mb")
"""Columns of the table of ratios; `seconds` is the sum over all phases."""
TARGETS = {
    ("padded", "cuda"): {"rollout": 5.0, "training": 1.6, "seconds": 3.0, "extra_mb": 2.0},
    ("trl", "cuda"): {"seconds": 2.0, "extra_mb": 2.0},
    ("padded", "cpu"): {"seconds": 3.0},
}
"""(other implementation, device) -> column -> factor by which our implementation should at least be better."""
MFU_TARGET = 0.45
"""Target MFU of our training phase on a GPU, for Pythia-1B."""

Row = dict[str, Any]


def run_drpo(problem: Problem, rounds: int, trl_path: Path | None = None, folder: Path = RESULTS) -> str:
    """Measures every implementation `rounds` times, alternating; appends a row for each and returns the table.

    TRL is skipped if `trl_path` (the folder that holds `trl/`; None: the installed version) has no PPO trainer. The
    padded reference and TRL are skipped if they do not fit into GPU memory. The table names what was skipped. Raises
    ValueError if the episodes are not a whole number of micro-batches, and RuntimeError if a block fails for another
    reason.
    """
    if problem.episodes % problem.micro_batch:
        raise ValueError(f"episodes: {problem.episodes} must be a multiple of micro-batches of {problem.micro_batch}")
    paths: dict[str, Path | None] = {"ours": None, "padded": None, "trl": trl_path}
    notes = []
    if _python(["-c", "import trl.experimental.ppo"], trl_path).returncode:
        del paths["trl"]
        notes.append(f"TRL skipped: {trl_path or 'the installed version'} has no PPO trainer (trl 1.12.0 has one)")
    load = os.getloadavg()[0]
    blocks: dict[str, list[Row]] = {side: [] for side in paths}
    for _ in range(rounds):
        for side in [*blocks]:
            try:
                blocks[side].append(_block(side, problem, paths[side]))
            except MemoryError:
                del blocks[side]
                notes.append(f"{side} skipped: out of GPU memory")
    rows = {side: _summary(past) for side, past in blocks.items()}
    shared = {"bench": "train drpo", **asdict(problem), "device": device_name(problem.device), "load_before": load}
    for row in rows.values():
        append_row({**shared, **row}, folder)
    tables = [*_table(rows, problem.device), "", *_ratios(rows, problem.device)]
    return "\n".join([*tables, *[line for note in notes for line in ("", note)]])


def _block(side: str, problem: Problem, path: Path | None) -> Row:
    done = _python(["-m", "bench.drpo.block", side, json.dumps(asdict(problem))], path)
    if done.returncode:
        if side != "ours" and "torch.OutOfMemoryError" in done.stderr:
            raise MemoryError
        raise RuntimeError(f"the measurement of {side!r} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _python(arguments: Sequence[str], path: Path | None) -> subprocess.CompletedProcess[str]:
    """Runs Python in the root of the repository, with `path` first on its import path."""
    paths = [str(p) for p in (path and path.resolve(), ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")) if p]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _summary(blocks: Sequence[Row]) -> Row:
    """Combines the rounds: returns medians of all numbers, and the times of the fastest and the slowest update."""
    seconds = [block["seconds"] for block in blocks]
    medians = {
        name: median(block[name] for block in blocks) for name, value in blocks[0].items() if isinstance(value, float)
    }
    return {**blocks[0], **medians, "rounds": len(blocks), "seconds_min": min(seconds), "seconds_max": max(seconds)}


def _table(rows: Mapping[str, Row], device: str) -> list[str]:
    seconds = "seconds" if device == "cuda" else "seconds of one CPU"
    lines = [
        f"| | {seconds} (least, most) | rollout | scoring | training | tokens/s of it | MFU % | tokens sampled "
        "| of a pass | extra MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        whole = f"{row['seconds']:.1f} ({row['seconds_min']:.1f}, {row['seconds_max']:.1f})"
        phases = " | ".join(f"{row[phase]:.1f}" for phase in PHASES)
        speed = f"{row['training_tokens_per_second']:.0f} | {_mfu(row, is_ours=row is rows['ours'])}"
        tokens = f"{row['sampled_tokens']} | {row['sequence_tokens']}"
        lines.append(f"| {row['provider']} | {whole} | {phases} | {speed} | {tokens} | {row['extra_mb']:.0f} |")
    return lines


def _mfu(row: Row, *, is_ours: bool) -> str:
    if row["training_mfu"] is None:
        return ""
    return f"{100 * row['training_mfu']:.1f}{f' (target {100 * MFU_TARGET:.0f})' if is_ours else ''}"


def _ratios(rows: Mapping[str, Row], device: str) -> list[str]:
    lines = [
        "| times ours | the whole update | rollout | scoring | training | extra memory |",
        "|---|---|---|---|---|---|",
    ]
    for side, row in rows.items():
        if side == "ours":
            continue
        targets = TARGETS.get((side, device), {})
        cells = []
        for name in MEASURED:
            target = f" (target {targets[name]:g})" if name in targets else ""
            cells.append(f"{row[name] / rows['ours'][name]:.2f}{target}")
        lines.append(f"| {row['provider']} | {' | '.join(cells)} |")
    return lines
