"""Makes the jobs for our trainer and for TRL's, with equal rows in equal order, one model, and equal settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.real.rows import Row, write_rows
from fastrlhf.models.loading import load_reward_model
from fastrlhf.runtime.optim import index_batches

PAD = "<|endoftext|>"
"""The padding token of both reward models. The padding token of SmolLM2 is its end of turn, <|im_end|>, so
transformers' classifiers would read the score at the token before the end."""

TASKS: dict[str, dict[str, Any]] = {
    "sft": {"trainer": "SFT", "task": "sft"},
    "dpo": {"trainer": "DPO", "task": "dpo"},
    "ipo": {"trainer": "DPO", "task": "dpo", "loss_type": "ipo"},
    "reward": {"trainer": "Reward", "task": "reward"},
}
LEARNING_RATE = {"sft": 2e-5, "dpo": 5e-6, "ipo": 5e-6, "reward": 2e-5}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a trainer in a separate process."""

    task: str
    """Name of our task in bench.train.tasks."""
    trainer: str
    """Prefix NAME of TRL's classes NAMETrainer and NAMEConfig."""
    model: str
    rows: str
    """Path of the rows, as JSON lines."""
    settings: dict[str, Any]
    """Keys of the configuration of the trainer."""
    threads: int = 1


def both_jobs(
    task: str, rows: Sequence[Row], model: str, work: Path, *, steps: int, batch: int, trl_batch: int, is_chat: bool
) -> tuple[Job, Job]:
    """Writes the rows to `work` and returns our job and TRL's. Each step takes `batch` rows; TRL splits them into
    batches of `trl_batch`. `model` is the folder of the policy, or of the reward model.

    TRL trains the newline that ChatML writes after a turn, and so does our side (`train_suffix`). A reward model of
    TRL would read its score at this newline, ours reads it at the end of the turn; for reward models TRL therefore gets
    conversations as text without the newline.
    """
    about = TASKS[task]
    shared: dict[str, Any] = {"max_steps": steps, "learning_rate": LEARNING_RATE[task], "lr_scheduler_type": "constant"}
    shared |= {"weight_decay": 0.0, "max_grad_norm": 1.0} | {k: v for k, v in about.items() if k == "loss_type"}
    ours = shared | {
        "per_device_train_batch_size": batch, "micro_batch_tokens": 2048, "max_length": 2048, "seed": 0,
        **({"train_suffix": True} if is_chat and task != "reward" else {}),
    }  # fmt: skip
    theirs = shared | {
        "per_device_train_batch_size": trl_batch, "gradient_accumulation_steps": batch // trl_batch,
        **({"pad_token": PAD} if task == "reward" else {}),
        **({"precompute_ref_log_probs": True} if task in ("dpo", "ipo") else {}),
    }  # fmt: skip
    drawn = [rows[i] for indices in index_batches(len(rows), batch, steps, 0) for i in indices]
    our_rows = write_rows(rows, work / "ours.jsonl")
    their_rows = write_rows([_for_trl(task, row, model) for row in drawn], work / "trl.jsonl")
    job = partial(Job, task=about["task"], trainer=about["trainer"], model=model)
    return job(rows=our_rows, settings=ours), job(rows=their_rows, settings=theirs)


def reward_model(policy: str, folder: Path) -> str:
    """Writes a reward model with a new score head over the weights of `policy`, from which both sides start."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = PAD
    load_reward_model(policy, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _for_trl(task: str, row: Row, model: str) -> Row:
    if task == "sft":
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    if task == "reward" and not isinstance(row["prompt"], str):
        template = AutoTokenizer.from_pretrained(model).apply_chat_template
        return {
            name: template(row["prompt"] + row[name], tokenize=False).removesuffix("\n")
            for name in ("chosen", "rejected")
        }
    return row


def run_job(job: Job, work: Path, trl: str = "") -> dict[str, Any]:
    """Runs our trainer, or TRL's with the Python interpreter `trl`; returns the result of the program.

    Raises RuntimeError with the end of its output if it fails.
    """
    question, answer = work / "job.json", work / "result.json"
    question.write_text(json.dumps(asdict(job)), encoding="utf-8")
    program = (
        [trl, str(Path(__file__).with_name("trl_side.py"))] if trl else [sys.executable, "-m", "bench.real.our_side"]
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [*program, str(question), str(answer)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {run.returncode}\n{run.stderr[-3000:]}")
    return json.loads(answer.read_text(encoding="utf-8"))


def has_trl(python: str) -> bool:
    """Returns whether the Python interpreter `python` can import TRL."""
    try:
        return subprocess.run([python, "-c", "import trl"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
