"""Compares PPO and DR-PO on a task that favours resets: hard exploration, good references and an exact judge.

The demo's task is easy to explore, and there PPO is limited by the learned judge (bench/LOG.md). This task follows the
theory of DR-PO (arXiv 2404.08495, section 5): good late states are rare under the SFT policy and common in the
references. The writers of the SFT data are sloppier, an unbroken run of right facts pays far more, resets start from
careful references that SFT never saw, and the gold judge gives the reward. PPO and DR-PO then differ only in
exploration.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.results import append_row
from bench.toy import interval
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DemoConfig, PPOConfig
from fastrlhf.data.toy import QUESTION, ToyTask, toy_tokenizer
from fastrlhf.demo import NUM_PROMPTS, Judged, judge_stage, run_stage, stage_config
from fastrlhf.types import Rollout

SCALE = 4.0  # facts per unit of reward, so that rewards are as large as the scores of the demo's reward model
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # all arms sample about equally many tokens
    "ppo": ("ppo", {}),
    "drpo 0.5": ("drpo", {"reset_prob": 0.5, "max_steps": 48}),
    "drpo 1.0": ("drpo", {"reset_prob": 1.0, "max_steps": 60}),
}


def strict_task(seed: int) -> ToyTask:
    return ToyTask(seed=seed, chain=1.0, omit=0.2, wrong=0.15, stray=0.1, tire=0.25)


def run_resets(seeds: int, jobs: int, out: Path) -> str:
    """Trains all arms that have no results yet, appends a row per seed and arm, and returns the table in Markdown."""
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(pool.map(partial(_run_seed, out), range(seeds)))
    lines = ["| arm | gold reward | minus PPO | KL | length | sampled tokens |", "|---|---|---|---|---|---|"]
    for arm in rows[0]:
        own = [row[arm] for row in rows]
        gain = [row[arm]["gold_reward"] - row["ppo"]["gold_reward"] for row in rows]
        numbers = [sum(row[name] for row in own) / len(own) for name in ("kl", "mean_length", "tokens")]
        gold, gain = interval([row["gold_reward"] for row in own]), "" if arm in ("sft", "ppo") else interval(gain)
        lines.append(f"| {arm} | {gold} | {gain} | {numbers[0]:.2f} | {numbers[1]:.2f} | {numbers[2]:.0f} |")
    return "\n".join(lines)


def _run_seed(out: Path, seed: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    folder = out / f"seed-{seed}"
    config, task = DemoConfig(out=str(folder), seed=seed), strict_task(seed)
    if not (folder / "tokenizer").exists():
        toy_tokenizer().save_pretrained(folder / "tokenizer")
    for stage in ("sft", "reward"):  # the reward model only initialises the critic; it does not score responses
        if not (folder / stage).exists():
            run_stage(stage, config, task, folder)
    rows = {"sft": _row(judge_stage(config, task, folder, "sft"), tokens=0)}
    careful = replace(task, min_haste=0.0, max_haste=0.2).examples("train", NUM_PROMPTS)
    for arm, (method, settings) in ARMS.items():
        name = arm.replace(" ", "_")
        run = replace(stage_config(method, config, folder), output_dir=str(folder / name), **settings)
        assert isinstance(run, PPOConfig)
        result = train_ppo(run, careful, task.examples("validation", 128), judge=partial(gold_judge, task))
        tokens = int(sum(row["num_tokens"] for row in result.history))
        rows[arm] = _row(judge_stage(config, task, folder, name), tokens)
    for arm, row in rows.items():
        append_row({"bench": "resets", "seed": seed, "threads": 1, "arm": arm, **row})
    return rows


def _row(judged: Judged, tokens: int) -> dict[str, float]:
    gold = float(judged.gold.mean())
    return {"gold_reward": gold, "kl": judged.kl, "mean_length": judged.mean_length, "tokens": tokens}


def gold_judge(task: ToyTask, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Returns the gold rewards of the whole responses (reset tokens included) in facts / SCALE, [N]."""
    tokenizer, scores = toy_tokenizer(), []
    for rollout in rollouts:
        text = str(tokenizer.decode([*rollout.prefix.token_ids, *rollout.completion], skip_special_tokens=True))
        post, question, summary = text.partition(QUESTION)
        scores.append(task.gold_reward(post + question, summary) / SCALE)
    return torch.tensor(scores)
