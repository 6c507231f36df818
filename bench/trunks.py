"""`python -m bench trunks`: times a DR-PO update with shared prefixes ("trunks") and with separate sequences.

Both layouts process the same episodes. Prompts and responses are random tokens with the lengths of Reddit TL;DR (347
and 34 tokens on average). The weights are random, which affects neither speed nor token counts. The benchmark times
scoring (policy, reference, critic) and one training pass (policy, critic). `python -m bench rollout` times sampling and
the judge.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bench.results import RESULTS, append_row, device_name
from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.ppo import update
from fastrlhf.algorithms.prefixes import draw_prefixes
from fastrlhf.config import DRPOConfig
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.loading import build_policy
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import Rollout, TokenizedExample

VOCAB, EOS = 2000, 0
MODEL = LlamaConfig(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip

Row = dict[str, Any]


def run_trunks(group_sizes: list[int], episodes: int, rounds: int, device: str, folder: Path = RESULTS) -> str:
    """Times both layouts alternately, appends a row for each, and returns the table in Markdown."""
    rows = [
        {"group_size": size, "reset_group": kind, **row}
        for size in group_sizes
        for kind in ("point", "response")
        for row in _both(config_of(size, kind, episodes), rounds, torch.device(device))
    ]
    for row in rows:
        shared = {"bench": "trunks", "episodes": episodes, "threads": torch.get_num_threads()}
        append_row({**shared, "device": device_name(device), **row}, folder)
    lines = ["| group | starts at | packed | tokens of a pass | seconds per update |", "|---|---|---|---|---|"]
    for row in rows:
        start = "one point" if row["reset_group"] == "point" else "points of one response"
        way = "trunks" if row["share_trunks"] else "separately"
        lines.append(f"| {row['group_size']} | {start} | {way} | {row['tokens']} | {row['seconds']:.2f} |")
    return "\n".join(lines)


def config_of(group_size: int, reset_group: Any, episodes: int) -> DRPOConfig:
    return DRPOConfig(
        per_device_train_batch_size=episodes,
        num_generations=group_size,
        reset_group=reset_group,
        num_ppo_epochs=1,
        response_length=53,
    )


def _both(config: DRPOConfig, rounds: int, device: torch.device) -> list[Row]:
    policy = build_policy(MODEL, vocab_size=VOCAB, eos_token_id=EOS, seed=0, device=device)
    reference = frozen_copy(policy)
    critic = critic_like(policy)
    rollouts = rollouts_of(config)
    ways = {share: replace(config, share_trunks=share) for share in (False, True)}
    seconds: dict[bool, list[float]] = {share: [] for share in ways}
    tokens = {}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for share, way in ways.items():
            optimizer = Optimizer({"": policy, "value_": critic}, way, num_steps=1)
            packs = pack_episodes(way, rollouts, range(config.batch_size // config.num_generations), device)
            scores = torch.zeros(len(rollouts), device=device)
            start = perf_counter()
            experience, _ = score_episodes(way, policy, reference, critic, rollouts, scores, packs, EOS)
            # The update waits for the device at its end.
            update(way, policy, critic, optimizer, rollouts, experience, packs, seed=(0, 0))
            seconds[share].append(perf_counter() - start)
            tokens[share] = sum(item.batch.num_tokens for mini in packs for item in mini)
    return [
        {"share_trunks": share, "tokens": tokens[share], "seconds": float(np.median(seconds[share][1:]))}
        for share in ways
    ]


def critic_like(policy: Any) -> LlamaForSequenceClassification:
    """Makes a critic with the same architecture as the policy."""
    config = LlamaConfig(**policy.config.to_diff_dict() | {"num_labels": 1, "pad_token_id": None})
    critic = LlamaForSequenceClassification(config)
    critic.to(policy.device)  # pyright: ignore[reportArgumentType] (as in models/loading.py)
    return critic.eval()


def rollouts_of(config: DRPOConfig) -> list[Rollout]:
    draw = np.random.default_rng(0)

    def text(mean: float, deviation: float, least: int, most: int) -> list[int]:
        return draw.integers(1, VOCAB, int(np.clip(draw.normal(mean, deviation), least, most))).tolist()

    prompts = [
        TokenizedExample(prompt=text(347, 95, 50, 512), reference=[*text(33, 6.5, 15, 52), EOS], row=row)
        for row in range(config.batch_size // config.num_generations)
    ]
    found = []
    for prefix in draw_prefixes(config, prompts, 0):
        completion = [*text(33 - prefix.num_reset, 6.5, 1, 52 - prefix.num_reset), EOS]
        logprobs = [-1.0] * len(completion)
        found.append(Rollout(prefix=prefix, completion=completion, sampler_logprob=logprobs, ended=True))
    return found
