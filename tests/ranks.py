"""What the processes of tests/test_distributed.py run: torchrun --nproc-per-node 2 tests/ranks.py FOLDER.

Each leaves what it saw in FOLDER/rank-0.json and FOLDER/rank-1.json, and its runs in FOLDER/two.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastrlhf import cli
from fastrlhf.algorithms.stage import Stage
from fastrlhf.data.packing import pack, sequence
from fastrlhf.distributed import from_all, gathered, is_first, largest, on_each, on_first, share, total
from fastrlhf.interrupts import Interrupted
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.sharding import full, give_back, like, shard, whole
from tests import resumable, tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"activation_checkpointing": True},
    "reward": {},
    "dpo": {"loss_type": ("sigmoid", "ipo"), "loss_weights": (1.0, 0.1)},
    "groups": {"precompute_ref_log_probs": False},
    "ppo": {"truncation": "bootstrap"},
    "drpo": {"num_mini_batches": 1, "reset_source": "sample"},
    "rto": {"kl_placement": "loss", "kl_estimator": "exact"},
}
"""Every trainer: with a live reference (groups); with a critic, returns that go on, a steered KL and early stops (ppo);
with a judge of the user's and resets that the reference writes (drpo); with the exact KL in the loss (rto)."""

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


def run(kind: str, place: Path, folder: Path, **settings: Any):
    """A run of two steps, several micro-batches each."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    keys = {"max_steps": 2, "eval_steps": 1, "save_steps": 0, "micro_batch_tokens": 64}
    return resumable.run(kind, models(place), folder, **keys | SETTINGS[kind] | settings)


def models(place: Path) -> dict[str, str]:
    return {name: str(place / name) for name in ("policy", "judge", "dpo")}


def command(place: Path, folder: Path) -> list[str]:
    """SFT from the command line, of a model from scratch whose head is its embedding."""
    flags = {
        "model_config": json.dumps(MODEL),
        "tokenizer_name_or_path": models(place)["policy"],
        "dataset_name": str(place / "rows.jsonl"),
        "num_eval_examples": 3,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_length": 32,
        "learning_rate": 0.01,
        "output_dir": str(folder),
    }
    return ["sft", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def exchanges() -> dict[str, Any]:
    """What comes of one exchange of each kind. Rank r has r + 2 rows."""
    rank = dist.get_rank()
    rows = torch.full((rank + 2, 1), float(rank))
    try:
        on_first(lambda: 1 // 0)
    except ZeroDivisionError as error:
        told = str(error)
    try:
        on_first(stubborn)
    except RuntimeError as error:
        strange = str(error)
    try:
        on_each(lambda: 1 // (1 - rank))
    except ZeroDivisionError as error:
        told_by_second = str(error)
    return {
        "gathered": gathered(rows)[:, 0].tolist(),
        "total": total(rows[:2, 0]).tolist(),
        "largest": largest(rows[:2, 0]).tolist(),
        "untouched": rows[:, 0].tolist(),
        "from_all": from_all(rank),
        "on_first": on_first(lambda: rank),
        "told": told,
        "on_each": on_each(lambda: rank),
        "told_by_second": told_by_second,
        "strange": strange,
        "share": list(share(list(range(5)))),
    }


def stubborn() -> None:
    class Stubborn(Exception):  # no other process can unpickle it
        pass

    raise Stubborn("of a judge")


def held(model: torch.nn.Module) -> int:
    """Numbers that this rank can read of a model without asking."""
    return sum(parameter.numel() for parameter in model.parameters() if not isinstance(parameter, DTensor))


def sharded_model() -> dict[str, Any]:
    """What this rank holds of a model, and whether it is the model that it was."""
    model, plain = tiny.policy("qwen3"), tiny.policy("qwen3")
    batch = pack([sequence([5, 6, 7], [8, 9])])
    shard(model)
    parts = [parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    with whole(model), torch.no_grad():  # before any other forward, and a pass more on the second rank
        inside = [token_logprobs(model, batch).logprob for _ in range(1 + dist.get_rank())][-1]
    with torch.no_grad():
        token_logprobs(model, batch)
    kept = held(model)
    give_back(model)
    left = held(model)
    expected = token_logprobs(plain, batch).logprob
    expected.sum().backward()
    token_logprobs(model, batch).logprob.sum().backward()
    pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    return {
        "held": sum(parts),
        "kept": kept,
        "left": left,
        "all": sum(parameter.numel() for parameter in plain.parameters()),
        "logprob": (inside - expected).abs().max().item(),
        "whole": max((full(ours) - theirs).abs().max().item() for ours, theirs in pairs),
        "filled": max((full(like(ours, theirs)) - theirs).abs().max().item() for ours, theirs in pairs),
        # Two ranks of the same pack: the sum is twice the gradient of one.
        "gradient": max((full(o.grad) / 2 - t.grad).abs().max().item() / t.grad.abs().max().item() for o, t in pairs),
    }


def stopped(place: Path, two: Path) -> bool:
    """A PPO run that a signal to the second rank alone stops after its first step; then the same command again."""
    log, folder = Stage.log, two / "ppo-resumed"

    def signalled(stage: Stage, step: int, *arguments: Any, **keywords: Any) -> None:
        if step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        log(stage, step, *arguments, **keywords)

    Stage.log = signalled
    try:
        run("ppo", place, folder)
    except Interrupted as stop:
        interrupted = stop.exit_code == 128 + signal.SIGTERM
    else:
        interrupted = False
    Stage.log = log
    on_first(lambda: shutil.copytree(folder, place / "one" / "ppo-resumed"))
    run("ppo", place, folder)
    return interrupted


def main(place: Path) -> None:
    torch.set_num_threads(1)
    two = place / "two"
    for kind in SETTINGS:
        run(kind, place, two / kind)
    seen = {"exchanges": exchanges(), "model": sharded_model(), "interrupted": stopped(place, two)}
    (place / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    assert is_first() == (dist.get_rank() == 0)
    assert cli.main(command(place, two / "command")) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
