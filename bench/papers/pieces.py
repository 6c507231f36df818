"""Compares REBEL, RRPO and PRIME with PPO and GRPO on the embedded task, at about equally many sampled tokens.

    ppo     a critic that starts from the policy, one response per prompt
    grpo    groups of 4, no critic
    rebel   groups of 4, with a regression on reward differences instead of the clipped loss (`update: pair`)
    rrpo    groups of 4; half of the groups with a failure restart inside a failed response (`reset_source: rollout`)
    prime   groups of 4, with token rewards from a model that is trained on the outcomes (`dpo_refine: outcome`)

The task is that of `bench.resets`, where late states are rare for the policy and the gold judge gives the reward. For
RRPO a response fails if its reward is below the mean of its group. For PRIME it fails if its reward is below 0.75, or
three facts, which is about the mean reward of the SFT model. The SFT model of a seed is trained once and shared by all
arms. All other settings are those of the demo, except for half its episodes per update.
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
from typing import Any

import torch

from bench.papers.embedded import EPISODES, Row
from bench.resets import gold_judge, strict_task
from bench.results import append_row
from bench.toy import interval
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DemoConfig, PPOConfig
from fastrlhf.data.toy import toy_tokenizer
from fastrlhf.demo import NUM_PROMPTS, judge_stage, run_stage, stage_config

GROUP: dict[str, Any] = {"advantage_estimator": "grpo", "num_generations": 4}
ARMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": GROUP,
    "rebel": GROUP | {"update": "pair"},
    "rrpo": GROUP | {"reset_prob": 0.5, "reset_source": "rollout", "max_steps": 24},
    "prime": GROUP
    | {"advantage_estimator": "prime", "dpo_refine": "outcome", "dpo_refine_learning_rate": 3e-4}
    | {"dpo_reward_norm": "batch", "dpo_reward_scale": 1.0, "success_threshold": 0.75},
}
UPDATES = 30
"""Number of updates of every arm except rrpo, which takes fewer, because it samples about 1.25 times as many tokens per
update."""


def run_pieces(seeds: int, jobs: int, runs: Path, out: Path) -> str:
    """Trains all arms that have no results yet and returns the table in Markdown.

    Models that exist under `runs` are not trained again. A row per new run is appended to `out/results`.
    """
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(partial(_make_model, runs), range(seeds)))
        cases = [(arm, seed) for seed, arm in product(range(seeds), ARMS)]
        rows = list(pool.map(partial(_run_arm, runs, out / "results"), *zip(*cases, strict=True)))
    found: dict[str, list[Row]] = {arm: [] for arm in ARMS}
    for (arm, _), row in zip(cases, rows, strict=True):
        found[arm].append(row)
    return table(found)


def _make_model(runs: Path, seed: int) -> None:
    torch.set_num_threads(1)
    folder = runs / "pieces" / f"seed-{seed}"
    if not (folder / "tokenizer").exists():
        toy_tokenizer().save_pretrained(folder / "tokenizer")
    if not (folder / "sft" / "config.json").exists():
        run_stage("sft", DemoConfig(out=str(folder), seed=seed), strict_task(seed), folder)


def _run_arm(runs: Path, results: Path, arm: str, seed: int) -> Row:
    torch.set_num_threads(1)
    folder, task = runs / "pieces" / f"seed-{seed}", strict_task(seed)
    config, done = DemoConfig(out=str(folder), seed=seed), folder / arm / "row.json"
    if not done.exists():
        settings = stage_config("ppo", config, folder)
        assert isinstance(settings, PPOConfig)
        own = {"reward_model_path": "", "max_steps": UPDATES, "per_device_train_batch_size": EPISODES}
        own |= {"output_dir": str(folder / arm), "rollout_batch_size": EPISODES, "num_eval_examples": 0}
        settings = replace(settings, **own | {"num_sample_generations": 1, "progress": False} | ARMS[arm])
        careful = replace(task, min_haste=0.0, max_haste=0.2).examples("train", NUM_PROMPTS)
        history = train_ppo(settings, careful, judge=partial(gold_judge, task)).history
        judged = judge_stage(config, task, folder, arm)
        row = {"bench": "papers", "paper": "pieces", "experiment": "embedded", "arm": arm, "seed": seed}
        row |= {"updates": len(history), "tokens": int(sum(update["num_tokens"] for update in history))}
        row |= {"gold_reward": float(judged.gold.mean()), "kl": judged.kl, "mean_length": judged.mean_length}
        append_row(row, results)
        done.write_text(json.dumps(row))
    return json.loads(done.read_text())


def table(found: Mapping[str, Sequence[Row]]) -> str:
    """Formats a Markdown table of gold rewards (facts) on held-out posts: means over seeds with 95 % intervals,
    differences paired by seed."""
    lines = ["| arm | gold reward | minus PPO | minus GRPO | KL | sampled tokens |", "|---|---|---|---|---|---|"]
    for arm, rows in found.items():
        ppo, grpo = ("" if arm == base else interval(_minus(rows, found[base])) for base in ("ppo", "grpo"))
        kl, tokens = fmean(row["kl"] for row in rows), fmean(row["tokens"] for row in rows)
        gold = interval([row["gold_reward"] for row in rows])
        lines.append(f"| {arm} | {gold} | {ppo} | {grpo} | {kl:.2f} | {tokens:.0f} |")
    return "\n".join(lines)


def _minus(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    return [own["gold_reward"] - other["gold_reward"] for own, other in zip(rows, others, strict=True)]
