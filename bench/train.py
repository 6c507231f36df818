"""`python -m bench train dpo`: DPO on real dialogues, ours and TRL's, the same pairs of token ids, in one process.

Each runs whole optimiser steps of its own trainer over the same pairs, reference log-probs computed before. TRL pads,
so it is tried with several batch sizes, and with the pairs of each step sorted by length.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, TrainerCallback

from bench.results import RESULTS, append_row, device_name
from fastrlhf.algorithms.preference import train_dpo
from fastrlhf.config import DPOConfig
from fastrlhf.data.examples import load_examples
from fastrlhf.data.inputs import open_inputs
from fastrlhf.models.loading import build_policy
from fastrlhf.types import TokenizedExample

PAIRS_PER_STEP = 32
MODELS: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "qwen3-0.6b": AutoConfig.for_model(
        "qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Random weights: neither speed nor memory asks what they are."""

Row = dict[str, Any]


def run_train(model: str, steps: int, batch_sizes: Sequence[int], device: str, folder: Path = RESULTS) -> str:
    """Runs ours, with and without shared prompts and, on a GPU, with checkpointed and with offloaded activations, and
    TRL at each batch size; appends rows, returns a table.

    The dialogues are the first ones of hh_helpful_test in FASTRLHF_DATA; ours draws them in another order.
    """
    data = os.environ["FASTRLHF_DATA"]
    dtype = "bfloat16" if device == "cuda" else "float32"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        common: dict[str, Any] = {
            "tokenizer_name_or_path": f"{data}/tokenizers/small_bpe2000_tokenizer.json.gz",
            "eos_token": "<|endoftext|>",
            "chat_template": "hh",
            "max_length": 1024,
            "truncation_mode": "drop",
            "model_name_or_path": work,
            "max_steps": steps,
            "learning_rate": 1e-6,
            "per_device_train_batch_size": PAIRS_PER_STEP,
            "micro_batch_tokens": 8192 if device == "cpu" else 65_536,
            "dtype": dtype,
            "device": device,
            "progress": False,
        }
        examples = load_examples(f"{data}/hh_helpful_test.jsonl.gz").examples[: steps * PAIRS_PER_STEP]
        tokenizer, inputs = open_inputs(DPOConfig(**common), ["chosen", "rejected"], examples, None)
        tokenizer.pad_token = tokenizer.eos_token  # TRL would add one, beyond the model's vocabulary
        tokenizer.save_pretrained(work)
        vocab = max(MODELS[model].vocab_size, len(tokenizer))
        build_policy(MODELS[model], vocab_size=vocab, eos_token_id=0, seed=0).save_pretrained(work)
        variants = {"ours": {}, "ours, prompts twice": {"share_prompts": False}}
        if device == "cuda":
            again = {"activation_checkpointing": True}
            variants |= {"ours, layers again": again, "ours, offloaded": again | {"activation_offloading": True}}
        for name, settings in variants.items():
            with _Memory(device) as memory:
                result = train_dpo(DPOConfig(**common, **settings, output_dir=f"{work}/{name}"), examples)
            logged = (Path(work) / name / "metrics.jsonl").read_text().splitlines()
            rows.append(_row(name, json.loads(logged[-1])["time"], result.history, memory))
            del result
        for batch_size in batch_sizes:
            for by_length in (False, True):
                pairs = inputs.train
                if by_length:
                    steps_of = [pairs[i : i + PAIRS_PER_STEP] for i in range(0, len(pairs), PAIRS_PER_STEP)]
                    pairs = [pair for step in steps_of for pair in sorted(step, key=_longest)]
                name = f"TRL, batches of {batch_size}{', sorted by length' if by_length else ''}"
                with _Memory(device) as memory:
                    seconds, history = _trl(work, pairs, batch_size, device, dtype)
                rows.append(_row(name, seconds, history, memory))
    for row in rows:
        shared = {
            "bench": "train dpo",
            "model": model,
            "steps": steps,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
        }
        append_row({**shared, "device": device_name(device), **row}, folder)
    return _table(rows)


def _trl(
    path: str, pairs: Sequence[TokenizedExample], batch_size: int, device: str, dtype: str
) -> tuple[float, list[Row]]:
    """(seconds from the first step to the end of the last, what was logged of each)."""
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Trainer(trl.DPOTrainer):
        """Takes the token ids as they are."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(perf_counter())

    clock = Clock()
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)),
            args=trl.DPOConfig(
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=PAIRS_PER_STEP // batch_size, learning_rate=1e-6, max_length=None,
                precompute_ref_log_probs=True, precompute_ref_batch_size=batch_size, logging_steps=1, report_to=[],
                gradient_checkpointing=False, use_cpu=device == "cpu", bf16=False, disable_tqdm=True,
                save_strategy="no", train_sampling_strategy="sequential",
                dataloader_pin_memory=device == "cuda",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
        return clock.times[-1] - clock.times[0], [log for log in trainer.state.log_history if "loss" in log]


class _Memory:
    """Peak megabytes on the GPU within it, beyond what was there; None on a CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.peak_mb = device, None

    def __enter__(self) -> _Memory:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.peak_mb = (torch.cuda.max_memory_allocated() - self.before) / 1e6


def _row(name: str, seconds: float, history: Sequence[Row], memory: _Memory) -> Row:
    return {
        "provider": name,
        "pairs_per_second": len(history) * PAIRS_PER_STEP / seconds,
        "peak_mb": memory.peak_mb,
        "first_loss": float(history[0]["loss"]),
        "last_loss": float(history[-1]["loss"]),
    }


def _longest(pair: TokenizedExample) -> int:
    return len(pair.prompt) + max(len(pair.chosen or ()), len(pair.rejected or ()))


def _table(rows: Sequence[Row]) -> str:
    lines = ["| | pairs per second | peak MB | first loss | last loss |", "|---|---|---|---|---|"]
    for row in rows:
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        losses = f"{row['first_loss']:.4f} | {row['last_loss']:.4f}"
        lines.append(f"| {row['provider']} | {row['pairs_per_second']:.1f} | {peak} | {losses} |")
    return "\n".join(lines)
