"""`python -m bench rollout`: times the sampling and the judging of the episodes of a DR-PO update.

Prompts and responses have the lengths of Reddit TL;DR, as in `bench/trunks.py`. The model has random weights, so most
responses end at the limit of 53 tokens (reset tokens included) and few at an EOS. On a CPU the reported seconds are CPU
seconds summed over all threads, so other programs on the machine do not count.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import get_args

import numpy as np
import torch

from bench.results import RESULTS, append_row, device_name
from bench.trunks import EOS, MODEL, VOCAB, Row, config_of, critic_like, rollouts_of
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import DRPOConfig
from fastrlhf.data.packing import trunks
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.models.loading import build_policy
from fastrlhf.rollout.engine import Decode


def run_rollout(
    group_sizes: list[int], episodes: int, slots: int, rounds: int, device: str, folder: Path = RESULTS
) -> str:
    """Times each group size and decoder, appends a row for each, and returns the table in Markdown."""
    rows = [
        row
        for size in group_sizes
        for kind in (["point", "response"] if size > 1 else ["point"])
        for row in _rows(replace(config_of(size, kind, episodes), rollout_batch_size=slots), rounds, device)
    ]
    for row in rows:
        shared = {"bench": "rollout", "episodes": episodes, "slots": slots, "threads": torch.get_num_threads()}
        append_row({**shared, "device": device_name(device), **row}, folder)
    lines = [
        "| group | starts at | decode | tokens of the prefixes | prefilled | sampled | seconds | judge's seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = "one point" if row["reset_group"] == "point" else "points of one response"
        tokens = f"{row['prefix_tokens']} | {row['prefilled']} | {row['sampled']}"
        times = f"{row['seconds']:.2f} | {row['judge_seconds']:.2f}"
        lines.append(f"| {row['group_size']} | {start} | {row['decode']} | {tokens} | {times} |")
    return "\n".join(lines)


def _rows(config: DRPOConfig, rounds: int, device: str) -> list[Row]:
    policy = build_policy(MODEL, vocab_size=VOCAB, eos_token_id=EOS, seed=0, device=torch.device(device))
    judge = reward_model_judge(critic_like(policy), eos_token_id=EOS, micro_batch_tokens=config.micro_batch_tokens)
    prefixes = [rollout.prefix for rollout in rollouts_of(config)]
    texts = [tuple(prefix.token_ids) for prefix in prefixes]
    clock = process_time if device == "cpu" else perf_counter
    ways: tuple[Decode, ...] = get_args(Decode) if device == "cuda" else ("eager",)
    found = []
    for decode in ways:
        engine = make_engine(replace(config, decode=decode), policy, EOS)
        seconds, judge_seconds, sampled = [], [], 0
        for _ in range(rounds + 1):  # the first round is a warm-up
            start = clock()
            rollouts = engine.generate(prefixes)  # includes the copy to the host, which waits for the device
            seconds.append(clock() - start)
            start = clock()
            torch.as_tensor(judge(rollouts)).sum().item()
            judge_seconds.append(clock() - start)
            sampled = sum(len(rollout.completion) for rollout in rollouts)
        found.append(
            {
                "group_size": config.num_generations,
                "reset_group": config.reset_group,
                "decode": decode,
                "prefix_tokens": sum(map(len, texts)),
                # Tokens to prefill, if all episodes fit into the slots at once
                "prefilled": sum(map(len, set(trunks(texts).values()))),
                "sampled": sampled,
                "seconds": float(np.median(seconds[1:])),
                "judge_seconds": float(np.median(judge_seconds[1:])),
            }
        )
    return found
