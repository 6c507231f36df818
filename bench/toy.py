"""Runs the demo for several seeds to test whether DR-PO is better than PPO.

Each seed has its own data, weights and samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.results import append_row

STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Number of seeds n -> two-sided 95 % quantile of Student's t distribution with n - 1 degrees of freedom."""


def run_toy(seeds: int, methods: Sequence[str], jobs: int, out: Path) -> str:
    """Runs the seeds that have no results yet, appends a row per seed and method, and returns the table in Markdown."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        summaries = list(pool.map(lambda seed: _run_seed(seed, methods, threads, out / f"seed-{seed}"), range(seeds)))
    return table(summaries)


def _run_seed(seed: int, methods: Sequence[str], threads: int, folder: Path) -> dict[str, Any]:
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "fastrlhf.cli", "demo", "--out", str(folder), "--seed", str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"seed-{seed}.log").open("w") as log:
            subprocess.run([*command, "--methods", *methods], env=environment, stdout=log, stderr=log, check=True)
        for method, row in json.loads(summary.read_text())["methods"].items():
            append_row({"bench": "toy", "seed": seed, "threads": threads, "method": method, **row})
    return json.loads(summary.read_text())


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Formats means over seeds with 95 % intervals (Student's t), and the paired difference of DR-PO and PPO."""
    methods = list(summaries[0]["methods"])
    lines = [
        "| method | win rate vs reference % | gold reward | minus SFT | RM score | KL | length | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        rows = [summary["methods"][method] for summary in summaries]
        gain = interval([row["minus_sft"] for row in rows]) if method != "sft" else ""
        lines.append(
            f"| {method} | {interval([100 * row['win_rate'] for row in rows])} "
            f"| {interval([row['gold_reward'] for row in rows])} | {gain} "
            + " ".join(f"| {mean(row[name] for row in rows):.2f}" for name in ("rm_score", "kl", "mean_length"))
            + f" | {mean(row['seconds'] for row in rows):.0f} |"
        )
    if {"ppo", "drpo"} <= set(methods):
        differences = [
            summary["methods"]["drpo"]["gold_reward"] - summary["methods"]["ppo"]["gold_reward"]
            for summary in summaries
        ]
        lines += ["", f"DR-PO minus PPO, gold reward, paired over {len(summaries)} seeds: {interval(differences)}"]
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Formats the mean over seeds and half the width of its 95 % interval (Student's t): "mean +- half"."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} +- {STUDENT_95[len(values)] * stdev(values) / len(values) ** 0.5:.2f}"
