"""Runs one of TRL's trainers as a separate program, which does not import fastrlhf:

    python bench/real/trl_side.py JOB RESULT

JOB is a JSON file with the fields of bench.real.sides.Job. RESULT receives the losses, the CPU seconds of each step
except the first, the peak memory in MB, and the version of TRL. TRL reads the raw rows and tokenises them itself.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)


def peak_mb() -> float:
    """Returns the largest resident memory of this process so far, in MB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with TRL's class `job["trainer"]` + "Trainer" and returns what RESULT receives."""
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset

    torch.set_num_threads(job["threads"])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    kind = AutoModelForSequenceClassification if job["trainer"] == "Reward" else AutoModelForCausalLM
    ends: list[float] = []

    class StepEnds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as out:
        trainer = getattr(trl, f"{job['trainer']}Trainer")(
            model=kind.from_pretrained(job["model"], dtype=torch.float32),
            args=getattr(trl, f"{job['trainer']}Config")(
                output_dir=out, num_train_epochs=1, max_length=None, logging_steps=1, report_to=[], use_cpu=True,
                bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", warmup_steps=0,
                train_sampling_strategy="sequential", dataloader_pin_memory=False, **job["settings"],
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[StepEnds()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "seconds": [after - before for before, after in pairwise(ends)],
        "peak_mb": peak_mb(),
        "trl": trl.__version__,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))), encoding="utf-8")
