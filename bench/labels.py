"""Trains DPO and IPO on few pairs for many epochs, with noisy to deterministic labels: does DPO forget its reference?

Azar et al. 2023 (arXiv 2310.12036, section 4.2) argue three points. If a preference is certain, DPO's optimum is
infinitely far from the reference for every beta. A single label per pair always looks certain. IPO's log-ratios stop at
1 / (2 tau). Their experiments are bandits (`python -m bench papers ipo`). This experiment trains a language model on a
small set of pairs of the embedded task, with one label each by its gold judge at different temperatures.

The responses are the same at every temperature; only the labels differ. Held-out accuracy is measured against the gold
order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from bench.results import append_row
from bench.toy import interval
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.config import DemoConfig, DPOConfig
from fastrlhf.data.toy import ToyTask, toy_tokenizer
from fastrlhf.demo import judge_stage, run_stage, stage_config

NUM_PAIRS, BATCH, NUM_HELD_OUT, NUM_POSTS = 128, 16, 256, 300
LEARNING_RATE = 3e-4


class Arm(NamedTuple):
    temperature: float
    """`ToyTask.label_temperature`: 0 gives deterministic labels; larger values give noisier labels."""
    epochs: int
    method: str
    """Name of a training stage of the demo: "dpo" or "ipo"."""
    beta: float
    """The value of beta (DPO) or tau (IPO)."""


ARMS = [
    *(Arm(*values, beta=0.1) for values in product((4.0, 1.0, 0.0), (2, 12), ("dpo", "ipo"))),
    *(Arm(*values, beta=1.0) for values in product((4.0, 0.0), (12,), ("dpo", "ipo"))),
]


def run_labels(seeds: int, jobs: int, out: Path) -> str:
    """Trains all arms that have no results yet, appends a row per new run, and returns the table in Markdown."""
    with ProcessPoolExecutor(jobs) as pool:
        return table(list(pool.map(partial(_run_seed, out), range(seeds))))


def table(seeds: Sequence[Mapping[Arm | None, Mapping[str, float]]]) -> str:
    """Formats the results as a Markdown table with a line per arm.

    Gold reward (facts), KL to SFT (nats per response) and held-out accuracy (%) are means over seeds with 95 %
    intervals. The difference of the log-ratios (nats) and the training accuracy (%) are means over the training pairs
    in the last epoch.
    """
    lines = [
        "| labels | epochs | method | beta | gold reward | KL to SFT | held-out % | training nats | training % |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| | 0 | sft | | {interval([rows[None]['gold_reward'] for rows in seeds])} | 0 | | | |",
    ]
    for arm in (arm for arm in seeds[0] if arm is not None):
        rows = [rows[arm] for rows in seeds]
        gold, kl = (interval([row[name] for row in rows]) for name in ("gold_reward", "kl"))
        held_out = interval([100 * row["held_out_accuracy"] for row in rows])
        nats, accuracy = (fmean(row[name] for row in rows) for name in ("train_log_ratio", "train_accuracy"))
        lines.append(
            f"| temperature {arm.temperature:g} | {arm.epochs} | {arm.method} | {arm.beta:g} "
            f"| {gold} | {kl} | {held_out} | {nats:.1f} | {100 * accuracy:.0f} |"
        )
    return "\n".join(lines)


def _run_seed(out: Path, seed: int) -> dict[Arm | None, dict[str, float]]:
    torch.set_num_threads(1)
    folder = out / f"seed-{seed}"
    config, task = DemoConfig(out=str(folder), seed=seed, num_eval=NUM_POSTS), ToyTask(seed=seed)
    if not (folder / "tokenizer").exists():
        toy_tokenizer().save_pretrained(folder / "tokenizer")
    if not (folder / "sft").exists():
        run_stage("sft", config, task, folder)
    rows: dict[Arm | None, dict[str, float]] = {}
    for arm in (None, *ARMS):
        done = folder / ("sft" if arm is None else "_".join(map(str, arm))) / "row.json"
        if not done.exists():
            row = {} if arm is None else _train(arm, config, folder, task, done.parent)
            judged = judge_stage(config, task, folder, done.parent.name)
            row |= {"gold_reward": float(judged.gold.mean()), "kl": judged.kl, "mean_length": judged.mean_length}
            append_row({"bench": "labels", "seed": seed, **(arm._asdict() if arm else {"method": "sft"}), **row})
            done.write_text(json.dumps(row))
        rows[arm] = json.loads(done.read_text())
    return rows


def _train(arm: Arm, config: DemoConfig, folder: Path, task: ToyTask, out: Path) -> dict[str, Any]:
    settings = stage_config(arm.method, config, folder)
    assert isinstance(settings, DPOConfig)
    steps = NUM_PAIRS // BATCH
    settings = replace(
        settings,
        output_dir=str(out),
        beta=arm.beta,
        max_steps=arm.epochs * steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        lr_scheduler_type="constant",
        progress=False,
    )
    pairs = replace(task, label_temperature=arm.temperature).examples("preferences", NUM_PAIRS)
    held_out = replace(task, label_temperature=0.0).examples("preferences_test", NUM_HELD_OUT)
    result = train_dpo(settings, pairs, held_out)
    last = result.history[-steps:]
    return {
        "num_pairs": NUM_PAIRS,
        "held_out_accuracy": result.final["eval_rewards/accuracies"],
        "train_accuracy": fmean(row["rewards/accuracies"] for row in last),
        "train_log_ratio": fmean(row["rewards/margins"] for row in last) / arm.beta,
    }
