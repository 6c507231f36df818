"""Runs one of our trainers as a separate program: `python -m bench.real.our_side JOB RESULT`.

JOB and RESULT are JSON files, as those of bench/real/trl_side.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.real.trl_side import peak_mb
from bench.train.sides import run_ours
from bench.train.tasks import TASKS
from fastrlhf.data.examples import load_examples


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with our trainer of the task `job["task"]`; returns losses, CPU seconds per step, and peak memory."""
    torch.set_num_threads(job["threads"])
    task = TASKS[job["task"]]
    config = task.config(
        model_name_or_path=job["model"], dtype="float32", device="cpu", progress=False, **task.settings,
        **job["settings"],
    )  # fmt: skip
    measured = run_ours(task, config, load_examples(job["rows"]).examples)
    return {"losses": measured.losses, "seconds": measured.seconds, "peak_mb": peak_mb()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))), encoding="utf-8")
