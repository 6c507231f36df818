"""`python -m bench real bf16`: measures the error of bfloat16 weights, and whether the saved model of a run has
the loss that the run evaluated.

The runs train all weights or LoRA in bfloat16 on dialogues, and evaluate on held-out dialogues at the end. Then the
model in their folder is loaded in float32 and in bfloat16, and its loss on the held-out dialogues is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.real.rows import short_pairs
from bench.results import RESULTS, append_row, device_name
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.loading import load_policy
from fastrlhf.types import Example, PackedBatch

STEPS, BATCH, HELD_OUT, TOGETHER = 20, 4, 24, 4
RUNS: dict[str, dict[str, Any]] = {
    "all weights": {"learning_rate": 2e-5},
    "lora": {"use_peft": True, "lora_r": 16, "learning_rate": 5e-4},
}


def run_bf16(policy: str, folder: Path = RESULTS, steps: int = STEPS) -> str:
    """Measures the rounding and the saved runs; appends a result row for each and returns tables."""
    pairs = short_pairs("chat", steps * BATCH + HELD_OUT)
    examples = [Example(prompt=pair["prompt"], chosen=pair["chosen"], row=i) for i, pair in enumerate(pairs)]
    held_out, train = examples[::-1][:HELD_OUT], examples[:-HELD_OUT]
    shared = {"bench": "real bf16", "model": "SmolLM2-135M-Instruct", "device": device_name("cpu")}
    packs = packs_of(policy, held_out)
    error = rounding(policy, packs[:2])
    append_row({**shared, "run": "rounding", **error}, folder)
    lines = [
        f"bfloat16 weights against float32: log-prob of a token {error['logprob_mean']:.4f} nats on average, "
        f"{error['logprob_max']:.3f} at most; loss {error['loss']:+.5f}; gradient {error['gradient']:.3f} of its norm",
        "",
        "| run in bfloat16 | held-out loss before | after, as evaluated | saved, read in float32 | read in bfloat16 "
        "| lost by reading in bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, settings in RUNS.items():
        row = saved_run(policy, settings, train, held_out, packs, steps)
        append_row({**shared, "run": name, **row}, folder)
        losses = " | ".join(f"{row[key]:.4f}" for key in ("before", "evaluated", "saved_float32", "saved_bfloat16"))
        lines.append(f"| {name} | {losses} | {100 * row['share_lost']:.1f} % of the gain |")
    return "\n".join(lines)


def packs_of(policy: str, examples: Sequence[Example]) -> list[PackedBatch]:
    """Returns the rows with their chosen responses, tokenised and packed `TOGETHER` rows at a time."""
    rows = tokenize_examples(examples, load_tokenizer(policy), max_length=1024, fields=("chosen",)).examples
    segments = [sequence(row.prompt, row.chosen or []) for row in rows]
    return [pack(segments[i : i + TOGETHER]) for i in range(0, len(segments), TOGETHER)]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, packs: Sequence[PackedBatch]) -> float:
    """Returns the mean loss in nats per response token."""
    logprobs = torch.cat([token_logprobs(model, batch).logprob for batch in packs])
    return -logprobs.mean().item()


def rounding(policy: str, packs: Sequence[PackedBatch]) -> dict[str, float]:
    """Compares the model in bfloat16 with the model in float32. Returns the mean and the largest difference of a
    token's log-prob (nats), the difference of the mean loss (nats), and the norm of the difference of the gradients of
    this loss, relative to the float32 gradient."""
    logprobs, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        model = load_policy(policy, dtype=dtype)
        logprob = torch.cat([token_logprobs(model, batch).logprob for batch in packs])
        (-logprob.mean()).backward()
        logprobs.append(logprob.detach())
        gradients.append([weight.grad.float() for weight in model.parameters() if weight.grad is not None])
    errors = (logprobs[1] - logprobs[0]).abs()
    apart = sum((a - b).double().square().sum().item() for a, b in zip(*gradients, strict=True))
    norm = sum(a.double().square().sum().item() for a in gradients[0])
    return {
        "tokens": len(errors),
        "logprob_mean": errors.mean().item(),
        "logprob_max": errors.max().item(),
        "loss": (logprobs[0] - logprobs[1]).mean().item(),
        "gradient": (apart / norm) ** 0.5,
    }


def saved_run(
    policy: str,
    settings: dict[str, Any],
    train: Sequence[Example],
    held_out: Sequence[Example],
    packs: Sequence[PackedBatch],
    steps: int,
) -> dict[str, Any]:
    """Trains with SFT in bfloat16 and returns held-out losses in nats per token: `before` and `evaluated` are reported
    by the run, `saved_float32` and `saved_bfloat16` are the losses of the saved model, loaded in this dtype.
    `share_lost` is the part of the improvement that is lost if the saved model is loaded in bfloat16."""
    with tempfile.TemporaryDirectory() as name:
        config = SFTConfig(
            model_name_or_path=policy, output_dir=name, dtype="bfloat16", device="cpu", response="chosen",
            max_steps=steps, per_device_train_batch_size=BATCH, micro_batch_tokens=1024, eval_on_start=True,
            progress=False, **settings,
        )  # fmt: skip
        result = train_sft(config, list(train), list(held_out))
        saved = {
            f"saved_{dtype}": mean_loss(load_policy(name, dtype=dtype), packs) for dtype in ("float32", "bfloat16")
        }
    before, evaluated = result.initial["eval_loss"], result.final["eval_loss"]
    lost = (saved["saved_bfloat16"] - evaluated) / (before - evaluated)
    return {"steps": steps, "before": before, "evaluated": evaluated, **saved, "share_lost": lost}
