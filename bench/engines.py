"""`python -m bench rollout --engine vllm`: compares vLLM, the built-in engine and the `generate` of transformers.

All engines sample the same episodes, with the lengths of Reddit TL;DR, from a model with the shape of SmolLM2-135M and
random weights. The time includes the transfer of the weights, prefill and decoding. Tokens count only if an episode
keeps them. On a CPU the seconds are CPU seconds of the trainer and the vLLM process together, summed over all threads,
so other programs on the machine do not count.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedModel

from bench.results import RESULTS, append_row, device_name
from bench.trunks import EOS, Row, config_of, rollouts_of
from fastrlhf.config import DRPOConfig
from fastrlhf.models.loading import build_policy
from fastrlhf.rollout.engine import Engine, TransformersEngine, first_end
from fastrlhf.rollout.vllm import VLLMEngine, open_vllm
from fastrlhf.types import Prefix

SMOLLM2 = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PaddedGenerate:
    """Samples with `generate` of transformers, in one left-padded batch.

    Counts only the tokens that an episode keeps; `generate` also computes tokens after the end or the limit of an
    episode.
    """

    model: PreTrainedModel
    config: DRPOConfig

    @torch.no_grad()
    def count(self, prefixes: list[Prefix]) -> int:
        """Samples all episodes and returns the number of tokens that they keep."""
        width = max(len(prefix.token_ids) for prefix in prefixes)
        ids = torch.tensor([[EOS] * (width - len(prefix.token_ids)) + list(prefix.token_ids) for prefix in prefixes])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prefixes])
        budgets = [self.config.response_length - prefix.num_reset for prefix in prefixes]
        generate = cast(Callable[..., torch.Tensor], self.model.generate)
        settings = {"do_sample": True, "temperature": self.config.temperature, "top_k": 0, "top_p": 1.0}
        settings |= {"max_new_tokens": max(budgets), "eos_token_id": EOS, "pad_token_id": EOS}
        tokens = generate(ids.to(self.model.device), attention_mask=mask.to(self.model.device), **settings)
        kept = [row[:budget] for row, budget in zip(tokens[:, width:].tolist(), budgets, strict=True)]
        ends = [first_end(row, EOS) for row in kept]
        return sum(len(row) if end is None else end + 1 for row, end in zip(kept, ends, strict=True))


def run_engines(
    episodes: int, rounds: int, device: str, dtype: str, folder: Path = RESULTS, model: LlamaConfig = SMOLLM2
) -> str:
    """Times the three engines alternately, appends a row for each, and returns the table in Markdown."""
    policy = build_policy(
        model, vocab_size=model.vocab_size, eos_token_id=EOS, seed=0, device=torch.device(device), dtype=dtype
    )
    config = replace(config_of(1, "point", episodes), rollout_batch_size=episodes, max_length=1024)
    config = replace(config, engine="vllm", vllm_gpu_memory_utilization=0.1 if device == "cpu" else 0.3)
    prefixes = [rollout.prefix for rollout in rollouts_of(config)]
    vllm = open_vllm(config, policy, EOS)
    built_in = TransformersEngine.of(config, policy, EOS)
    contenders: dict[str, Callable[[], int]] = {
        "vllm": lambda: _sampled(vllm, prefixes),
        "transformers": lambda: _sampled(built_in, prefixes),
        "padded generate": lambda: PaddedGenerate(model=policy, config=config).count(prefixes),
    }
    clock = (lambda: process_time() + _cpu_seconds(vllm)) if device == "cpu" else perf_counter
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, int] = {}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for name, sample in contenders.items():
            start = clock()
            tokens[name] = sample()
            speeds[name].append(tokens[name] / (clock() - start))
    rows: list[Row] = [
        {"engine": name, "tokens": tokens[name], "tokens_per_second": float(np.median(speeds[name][1:]))}
        for name in contenders
    ]
    shared: dict[str, Any] = {"bench": "engines", "episodes": episodes, "dtype": dtype, "rounds": rounds}
    shared |= {"threads": torch.get_num_threads(), "device": device_name(device)}
    lines = ["| engine | tokens | tokens per second |", "|---|---|---|"]
    for row in rows:
        append_row({**shared, **row}, folder)
        lines.append(f"| {row['engine']} | {row['tokens']} | {row['tokens_per_second']:.1f} |")
    return "\n".join(lines)


def _sampled(engine: Engine, prefixes: list[Prefix]) -> int:
    return sum(len(rollout.completion) for rollout in engine.generate(prefixes))


def _cpu_seconds(engine: VLLMEngine) -> float:
    """Returns the user and system CPU seconds that the vLLM processes have used."""
    ticks = 0
    for child in engine.children:
        after_name = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # utime and stime, fields 14 and 15 of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")
