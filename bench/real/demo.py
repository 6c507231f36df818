"""`make demo-real`: SFT, DPO and DR-PO of SmolLM2-135M on made-up posts, then report.html; ten minutes on two cores.

Every run trains a LoRA adapter of rank 16 in float32. SFT starts from SmolLM2, the other methods from the merged model
of SFT. The rule that judges the held-out summaries is also the reward of DR-PO. In the pairs of DPO the chosen summary
is correct.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.real.posts import gold_score, make_rows
from bench.real.rows import write_rows
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, DRPOConfig, SFTConfig
from fastrlhf.data.specials import special_ids
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.demo import Judged, format_summary, judged_row
from fastrlhf.evaluation.completions import respond, response_kl
from fastrlhf.models.loading import load_policy
from fastrlhf.report.report import write_report
from fastrlhf.runtime.result import TrainResult
from fastrlhf.types import Example

NUM_ROWS, NUM_HELD_OUT, LENGTH = 600, 64, 24
"""Numbers of posts for training and for judging, and the maximum number of tokens of a summary."""
START = "start"
"""Name of the untrained model in the report."""
LORA: dict[str, Any] = {
    "use_peft": True, "max_length": 160, "micro_batch_tokens": 1024, "dtype": "float32",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 5, "per_device_train_batch_size": 8, "learning_rate": 5e-4},
    "dpo": {"max_steps": 10, "per_device_train_batch_size": 8, "learning_rate": 2e-4, "beta": 0.1},
    "drpo": {
        "max_steps": 8, "per_device_train_batch_size": 16, "num_generations": 4, "num_ppo_epochs": 1,
        "learning_rate": 3e-4, "reset_prob": 0.5, "reset_min": 0, "response_length": LENGTH, "temperature": 1.0,
        "kl_coef": 0.05, "rollout_batch_size": 16, "missing_eos_score": None, "missing_eos_penalty": 1.0,
        "whiten_rewards": False, "reward_functions": ("bench.real.posts:judge",),
    },
}  # fmt: skip


def run_demo(policy: str, out: Path, seed: int = 0) -> str:
    """Trains and judges all methods; writes a folder for each, summary.json and report.html to the new folder `out`;
    returns the table of results. `policy` is the folder of the pretrained model."""
    out.mkdir(parents=True)
    rows = write_rows(make_rows(NUM_ROWS, seed), out / "posts.jsonl")
    folders, seconds, tokens = {START: policy}, {START: 0.0}, {START: 0}
    for name in SETTINGS:
        print(f"{name}: {SETTINGS[name]['max_steps']} steps", flush=True)
        start = time.perf_counter()
        result = train(name, str(out / "sft") if name != "sft" else policy, rows, out / name, seed)
        folders[name], seconds[name] = str(out / name), time.perf_counter() - start
        tokens[name] = int(sum(row["num_tokens"] for row in result.history))
    judged = {name: judge_model(folder, folders["sft"], seed) for name, folder in folders.items()}
    summary = {
        "task": "made-up posts, SmolLM2-135M-Instruct",
        "seed": seed,
        "device": "cpu",
        "methods": {name: judged_row(seed, name, judged, seconds[name], tokens[name]) for name in judged},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report = write_report(out)
    return f"{format_summary(summary)}\n\n{report}"


def train(name: str, policy: str, rows: str, folder: Path, seed: int) -> TrainResult:
    """Trains the model in `policy` with the method `name` on the rows of a file; writes the run to `folder`."""
    fields = LORA | SETTINGS[name] | {"dataset_name": rows, "output_dir": str(folder), "seed": seed}
    fields |= {"model_name_or_path": policy, "device": "cpu"}
    if name == "sft":
        return train_sft(SFTConfig(**fields))
    if name == "dpo":
        return train_dpo(DPOConfig(**fields))
    return train_ppo(DRPOConfig(**fields))


def judge_model(folder: str, sft: str, seed: int) -> Judged:
    """Samples a summary of each held-out post, and scores it."""
    posts = make_rows(NUM_HELD_OUT, seed + 1000)
    tokenizer, policy = load_tokenizer(folder), load_policy(folder)
    examples = [Example(prompt=post["prompt"], row=i) for i, post in enumerate(posts)]
    rollouts = respond(
        policy,
        tokenize_examples(examples, tokenizer, max_length=160, fields=()).examples,
        eos_token_id=special_ids(tokenizer)[0],
        response_length=LENGTH,
        temperature=1.0,
        seed=seed,
        batch_size=32,
    )
    texts = [str(tokenizer.decode(rollout.completion, skip_special_tokens=True)) for rollout in rollouts]
    return Judged(
        gold=np.array([gold_score(post["facts"], text) for post, text in zip(posts, texts, strict=True)]),
        reference_gold=np.array([gold_score(post["facts"], post["reference"]) for post in posts]),
        score=None,
        kl=response_kl(policy, load_policy(sft), rollouts, temperature=1.0, micro_batch_tokens=2048),
        mean_length=float(np.mean([len(rollout.completion) for rollout in rollouts])),
    )
