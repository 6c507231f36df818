"""The program of the two processes that tests/distributed/test_ranks.py starts.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER

Each process writes its observations to FOLDER/rank-0.json or FOLDER/rank-1.json, and its runs to FOLDER/two.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

import fastrlhf
from fastrlhf import cli
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.distributed.ranks import from_all, gathered, is_first, largest, on_each, on_first, share, total
from fastrlhf.models import adapters, layers
from fastrlhf.models.forward import scored_states, state_kl, token_logprobs
from fastrlhf.models.loading import build_policy
from fastrlhf.models.sharding import beginnings, full, give_back, like, own_pace, shard
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.runtime import optim
from fastrlhf.runtime.optim import Optimizer
from tests import resumable, tiny
from tests.cut_ranks import CUTS, cut, finished, rescued, stopped
from tests.hub_server import pushed
from tests.part_ranks import loaded_parts, paces, spread_rows, stopped_pass, stored_rows, watched_states

LORA = {"use_peft": True, "lora_r": 3, "adam_epsilon": 1e-3}
"""Settings of runs with an adapter. The epsilon of Adam is large, because the gradients of a new adapter are near zero
and Adam's first steps would otherwise depend only on their signs."""
STEADY = {"num_ppo_epochs": 1, "num_mini_batches": 1, "cliprange_value": 10.0} | {
    "adam_epsilon": 1.0,
    "value_learning_rate": 1e-3,
}
"""Settings for a critic with steep gradients: one pass per step, no value clipping, small updates, a large epsilon.
Without these settings the gradient norm differs by 1e-3 between two micro-batch sizes, even in a single process."""
FIRST = {"load_best_model_at_end": True}
"""Makes the run save the best model. For DPO this is the model after the first of the two steps."""
ROUNDED = {"dtype": "bfloat16", "master_weights": "stochastic_rounding"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"activation_checkpointing": True},
    "sft dora": LORA | {"activation_checkpointing": True, "use_dora": True, "lora_r": 1},
    "sft rounded": ROUNDED | {"micro_batch_tokens": 32},
    "reward": {"train_batch_size": 0, "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1"))},
    "dpo": {"loss_type": ("sigmoid", "ipo"), "loss_weights": (1.0, 0.1)} | FIRST,
    "dpo lora": LORA,
    "groups": {"precompute_ref_log_probs": False},
    "kto": LORA,
    "ppo": {"truncation": "bootstrap"},
    "drpo": LORA | {"num_mini_batches": 1, "reset_source": "sample"},
    "rto": {"kl_placement": "loss", "kl_estimator": "exact", "train_batch_size": 8},
    "refuel": {},
    "prime": {"reset_prob": 0.5, "adam_epsilon": 1e-3},
    "prime lora": LORA,
    "grpo": LORA,
    "roles": LORA | STEADY,
    "sft qwen3_moe": {"router_aux_loss_coef": 0.5, "adam_epsilon": 1e-3},
    "dpo qwen3_next": {"precompute_ref_log_probs": False, "adam_epsilon": 1e-3},
}
"""Settings of every run. They cover a batch per process (reward); a live reference (groups); a critic, bootstrapped
returns, an adaptive KL coefficient and early stops (ppo); a user-defined judge and resets into the dataset's responses
(drpo); the exact KL in the loss (rto); pairs of responses that continue the policy's failures (refuel); trained token
rewards (prime); dynamic sampling with truncated sampling at two temperatures and a reward function (grpo); models that
share weights (roles); an adapter with fewer rows than ranks (sft dora); and other model families."""
FAMILIES = ("qwen3_moe", "qwen3_next")
"""A mixture of experts with its router loss, and a hybrid model, which processes one sequence at a time."""

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "float32 copies": {"dtype": "bfloat16"},
    "rounded": ROUNDED,
    "8 bits": {"optim": "adamw_8bit"},
    "8 bits, rounded": ROUNDED | {"optim": "adamw_8bit"},
}


def run(kind: str, place: Path, folder: Path, **settings: Any):
    """Runs a trainer for two steps of several micro-batches each."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    keys = {"max_steps": 2, "eval_steps": 1, "save_steps": 0, "micro_batch_tokens": 64}
    trainer = kind.partition(" ")[0]
    family = {"policy": str(place / kind.partition(" ")[2])} if kind.endswith(FAMILIES) else {}
    return resumable.run(trainer, models(place) | family, folder, **keys | SETTINGS[kind] | settings)


def models(place: Path) -> dict[str, str]:
    adapters = {f"{role} adapter": str(place / f"adapted {role}" / "adapter") for role in ("judge", "dpo")}
    return {name: str(place / name) for name in ("policy", "judge", "dpo")} | adapters


def command(place: Path, folder: Path) -> list[str]:
    """Returns the command-line arguments of DPO. `run_first` makes an SFT run start first, from a new model with tied
    embeddings."""
    shared = {"train_batch_size": 4, "max_steps": 2, "max_length": 32, "num_eval_examples": 3}
    sft = {
        "model_config": MODEL,
        "tokenizer_name_or_path": models(place)["policy"],
        "dataset_name": str(place / "rows.jsonl"),
        "learning_rate": 0.01,
        "output_dir": str(folder),
    }
    dpo = {
        "run_first": ["sft"],
        "model_name_or_path": str(folder),
        "dataset_name": str(place / "pairs.jsonl"),
        "learning_rate": 0.001,
        "output_dir": str(folder.with_name("chain")),
    }
    file = folder.with_name(f"chain-{os.environ.get('RANK', 0)}.yaml")
    file.write_text(json.dumps({"shared": shared, "sft": sft, "dpo": dpo}))  # JSON is valid YAML
    return ["dpo", "--config", str(file)]


def exchanges() -> dict[str, Any]:
    """Calls every communication function of `distributed.ranks` once, with r + 2 rows on rank r. Returns name ->
    result."""
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


def installed(settings: dict[str, Any]) -> bool:
    return "optim" not in settings or find_spec("bitsandbytes") is not None


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "none"


def stubborn() -> None:
    class Stubborn(Exception):  # other processes cannot unpickle this class
        pass

    raise Stubborn("of a judge")


def held(model: torch.nn.Module) -> int:
    """Returns how many weights this rank holds in full at the moment, as plain tensors and not as shards."""
    return sum(parameter.numel() for parameter in model.parameters() if not isinstance(parameter, DTensor))


def sharded_model(holes: Collection[int] = ()) -> dict[str, Any]:
    """Shards a model. Returns how many weights this rank holds, and the largest differences from the unsharded model.
    Log-probs are over the ids outside `holes`."""
    model, plain = tiny.policy("qwen3"), tiny.policy("qwen3")
    batch = pack([sequence([5, 6, 7], [8, 9])])
    for each in (model, plain):
        limit_vocabulary(each, tiny.tokenizer(holes))
    shard(model)
    parts = [parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    with own_pace(model), torch.no_grad():  # before any other forward; rank 1 runs one forward more than rank 0
        inside = [token_logprobs(model, batch).logprob for _ in range(1 + dist.get_rank())][-1]
    with torch.no_grad():
        token_logprobs(model, batch)
    kept = held(model)
    give_back(model)
    left = held(model)
    expected = token_logprobs(plain, batch).logprob
    with torch.no_grad():
        both = ((each, scored_states(each, batch)) for each in (model, plain))
        kl, truth = (state_kl(each, x, each, x + 1, batch.targets).kl for each, x in both)
    expected.sum().backward()
    token_logprobs(model, batch).logprob.sum().backward()
    pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    return {
        "held": sum(parts),
        "kept": kept,
        "left": left,
        "all": sum(parameter.numel() for parameter in plain.parameters()),
        "logprob": (inside - expected).abs().max().item(),
        "kl": (kl - truth).abs().max().item(),
        "unlimited": (expected - token_logprobs(tiny.policy("qwen3"), batch).logprob).min().item(),
        "whole": max((full(ours) - theirs).abs().max().item() for ours, theirs in pairs),
        # One of the weights is a vector whose part on rank 0 is shorter than 20 entries.
        "begins": all(map(torch.equal, *(beginnings(m.parameters(), 20) for m in (model, plain)))),
        "filled": max((full(like(ours, theirs)) - theirs).abs().max().item() for ours, theirs in pairs),
        # Both ranks have the same pack, so the sum is twice the gradient of one rank.
        "gradient": max((full(o.grad) / 2 - t.grad).abs().max().item() / t.grad.abs().max().item() for o, t in pairs),
    }


def compiled_model() -> dict[str, Any]:
    """Trains compiled sharded layers on two packs of different lengths.

    Returns the largest relative error of a gradient, and the number of graphs that each of the two packs compiles.
    """
    models = [
        build_policy(MODEL | {"num_hidden_layers": 1}, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
        for _ in range(2)
    ]
    layers.compile_layers(models[0])
    shard(models[0])
    errors, graphs = [], []
    # The backend "eager", because the default backend would compile C++ code for minutes
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        for prompt in ([5, 6, 7], [5, 6, 7, 8, 9]):
            for model in models:
                model.zero_grad()
                token_logprobs(model, pack([sequence(prompt, [8, 9])])).logprob.sum().backward()
            for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
                errors.append((full(ours.grad) / 2 - theirs.grad).abs().max().item() / theirs.grad.abs().max().item())
            graphs.append(counters["stats"]["unique_graphs"])
    return {"gradient": max(errors), "first": graphs[0], "second": graphs[1] - graphs[0]}


def shared_weights() -> dict[str, Any]:
    """Shards a policy with an adapter and a reference that shares its weights, then merges the adapter.

    Returns how many tensors only the reference holds, and how much log-probs change at each step.
    """
    policy, batch = tiny.policy(), pack([sequence([5, 6, 7], [8, 9])])
    adapters.add_adapter(policy, SFTConfig(use_peft=True, lora_r=2), "")
    reference, plain = adapters.frozen_copy(policy), tiny.policy()
    shard(policy, reference)
    own, others = ({p.to_local().untyped_storage().data_ptr() for p in m.parameters()} for m in (policy, reference))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        adapted, expected = token_logprobs(policy, batch).logprob, token_logprobs(plain, batch).logprob
        give_back(policy)
        adapters.merge_adapter(policy)
        merged, kept = token_logprobs(policy, batch).logprob, token_logprobs(reference, batch).logprob
    return {
        "others": len(others - own),
        "adds": (adapted - expected).abs().max().item(),
        "merged": (merged - adapted).abs().max().item(),
        "kept": (kept - expected).abs().max().item(),
    }


def optimised(width: int, **settings: Any) -> bool:
    """Returns whether sharded training equals the training of one process bit for bit, given equal gradients.

    Compares the optimiser states after three steps. The sharded optimiser then loads the unsharded state, and the
    weights are compared after a fourth step. MLP weights are `width` x 64; attention weights have 4,096 entries.
    """
    # No clipping, because sharding changes the order in which the norm is summed, and so its last bits
    config = SFTConfig(**{"dtype": "float32", "max_grad_norm": 0.0, "learning_rate": 1e-2} | settings)
    sizes = MODEL | {"hidden_size": 64, "intermediate_size": width}
    models = [
        build_policy(sizes, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0, dtype=config.dtype) for _ in range(2)
    ]
    shard(models[0])
    optimizers = [Optimizer({"": model}, config, num_steps=4) for model in models]
    same = []
    with patch.object(optim, "NOISE", 1000):
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                for i, parameter in enumerate(model.parameters()):
                    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + i))
                    parameter.grad = like(parameter, drawn.to(parameter.dtype))
                optimizer.step()
            if step == 2:
                own, whole_state = (optimizer.state_dict() for optimizer in optimizers)
                same += [own.keys() == whole_state.keys()]
                same += [
                    torch.equal(full(own[key]), x) for key, x in whole_state.items() if isinstance(x, torch.Tensor)
                ]
                optimizers[0] = Optimizer({"": models[0]}, config, num_steps=4)
                optimizers[0].load_state_dict(copy.deepcopy(whole_state))
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return all(same) and all(torch.equal(full(ours), theirs) for ours, theirs in pairs)


def differences(place: Path, two: Path) -> dict[str, str]:
    """Starts runs in which one input differs between the ranks. Returns name of the input -> error on this rank."""
    second, own = dist.get_rank() == 1, place / f"seen by {dist.get_rank()}"
    for name in ("policy", "judge"):
        shutil.copytree(place / name, own / name)
    weights = load_file(own / "policy" / "model.safetensors")
    weights["model.norm.weight"][-1] += 0.01 * second
    save_file(weights, own / "policy" / "model.safetensors", {"format": "pt"})
    here, examples = Path.cwd(), tiny.examples
    told = {
        "seed": refusal(lambda: run("sft", place, two / "seed", seed=42 + second)),
        "key": refusal(lambda: run("sft", place, two / "key", learning_rate=0.5 if second else 0.25)),
    }
    try:
        tiny.examples = lambda count, seed=0: examples(count, seed + 5) if second else examples(count, seed)
        told["other rows"] = refusal(lambda: run("sft", place, two / "other rows"))
        tiny.examples = lambda count, seed=0: examples(count - 1, seed) if second else examples(count, seed)
        told["fewer rows"] = refusal(lambda: run("sft", place, two / "fewer rows"))
        tiny.examples = examples
        os.chdir(own)  # from here on a relative path names a different model on each rank
        told["weights"] = refusal(lambda: run("ppo", Path(), two / "weights"))
        if second:
            tiny.examples = lambda count, seed=0: [replace(one, reference=None) for one in examples(count, seed)]
        told["no reference"] = refusal(lambda: run("sft", place, two / "no reference"))
    finally:
        tiny.examples = examples
        os.chdir(here)
    with patch.object(fastrlhf, "__version__", "9.9" if second else fastrlhf.__version__):
        told["versions"] = refusal(lambda: run("sft", place, two / "versions"))
    return told


def main(place: Path) -> None:
    torch.set_num_threads(1)
    two = place / "two"
    states: dict[str, Any] = {}
    for kind in SETTINGS:
        with watched_states(states) if kind == "rto" else nullcontext():
            run(kind, place, two / kind)
    seen = {
        "states": states,
        "spread": spread_rows(),
        "exchanges": exchanges(),
        "model": sharded_model(),
        "limited": sharded_model({4, 17, 30}),
        "parts": loaded_parts(place, FAMILIES),
        "paces": paces(),
        "stored": stored_rows(place),
        "compiled": compiled_model(),
        "shared": shared_weights(),
        "optimised": {name: optimised(136, **settings) for name, settings in OPTIMIZERS.items() if installed(settings)},
        "uneven": optimised(129, **ROUNDED),
        "blocks": refusal(lambda: optimised(129, optim="adamw_8bit")) if installed({"optim": "adamw_8bit"}) else "",
        "interrupted": stopped(run, place, two),
        "pass": stopped_pass(run, place, two),
        "cuts": {part: cut(run, part, place, two) for part in CUTS},
        "finished": finished(run, place, two),
        "differences": differences(place, two),
        "rescued": rescued(run, place, two),
        "pushed": pushed(run, place, two),
    }
    (place / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    assert is_first() == (dist.get_rank() == 0)
    assert cli.main(command(place, two / "command")) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
