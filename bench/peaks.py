"""`python -m bench peaks`: measures the peak memory of a process that loads models, samples, judges, trains and saves.

The peaks of a single process and of two processes with gloo are compared on a CPU. They count the bytes of all storages
that torch operations have allocated and that still exist. The files hold bfloat16 weights and the models are loaded in
float32, because weights that need no conversion would stay in mapped files, which are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from bench.results import RESULTS, append_row
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.distributed.ranks import rank, world_size
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.models.adapters import add_adapter, frozen_copy
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.models.sharding import give_back, shard, whole_weights
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.rollout.shared import SharedEngine
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import Prefix

EOS, VOCAB = 1, 64
SMALLEST = 16384
"""Storages with fewer bytes are not counted."""
LAYERS = 16
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
SIZES |= {"intermediate_size": 512, "vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": None}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "experts": {"model_type": "qwen3_moe", "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    "lora": {"model_type": "llama", "tie_word_embeddings": True},
}
"""Kinds of models. The files of `experts` hold each expert in its own tensor, which transformers fuses on loading."""
PHASES = ("load", "rollout", "judge", "step", "save")


def write_models(folder: Path, kind: str) -> None:
    """Writes a random policy and a random reward model, in bfloat16."""
    fields: dict[str, Any] = {**SIZES, **MODELS[kind]}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config).bfloat16()
    policy.save_pretrained(folder / "policy")
    scorer = load_reward_model(str(folder / "policy"), pad_token_id=0, dtype="bfloat16")
    scorer.save_pretrained(folder / "judge")


def measure(folder: Path, kind: str) -> dict[str, int]:
    """Runs all phases with the models in `folder`; returns phase -> peak of this process in bytes."""
    lora: dict[str, Any] = {"use_peft": True, "lora_r": 2} if kind == "lora" else {}
    config = SFTConfig(dtype="float32", learning_rate=1e-3, **lora)
    prefixes = [Prefix(token_ids=[5, 6, 7 + i], num_reset=0, row=i, episode=i) for i in range(3)]
    peaks: dict[str, int] = {}
    with Live() as live:
        policy = load_policy(str(folder / "policy"))
        if lora:
            add_adapter(policy, config, "")
        reference = frozen_copy(policy)
        scorer = load_reward_model(str(folder / "judge"), pad_token_id=0, must_be_trained=True).requires_grad_(False)
        shard(policy, reference, scorer)
        peaks["load"] = live.restart()

        engine = TransformersEngine(
            model=policy, eos_token_id=EOS, response_length=4, temperature=1.0, seed=0, batch_size=2, stop_at_eos=False
        )
        rollouts = SharedEngine(engine=engine, model=policy, response_length=4).generate(prefixes)
        peaks["rollout"] = live.restart()

        reward_model_judge(scorer, eos_token_id=EOS, micro_batch_tokens=64)(rollouts)
        peaks["judge"] = live.restart()

        optimizer = Optimizer({"": policy}, config, num_steps=2)
        batch = pack([sequence([5, 6, 7], [8, 9])])
        for _ in range(2):
            with torch.no_grad():
                token_logprobs(reference, batch)
            give_back(reference)
            token_logprobs(policy, batch).logprob.sum().backward()
            optimizer.step()
        peaks["step"] = live.restart()

        whole_weights(policy)
        peaks["save"] = live.restart()
    return peaks


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate within the mode, and keeps their maximum in `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._most = 0  # an upper bound of the bytes that exist
        self._known: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        new = 0
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
                if storage.nbytes() >= SMALLEST and storage._cdata not in self._known:
                    self._known[storage._cdata] = StorageWeakRef(storage)
                    new += storage.nbytes()
        self._most += new
        if new and self._most > self.peak:
            self._most = self.live()
            self.peak = max(self.peak, self._most)
        return output

    def live(self) -> int:
        total = 0
        for key, reference in list(self._known.items()):
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._known[key]
            else:
                total += storage.nbytes()  # FSDP2 frees gathered weights by resizing their storage to 0
        return total

    def restart(self) -> int:
        """Returns the peak since the previous call."""
        peak, self.peak = self.peak, self.live()
        return peak


def compare(kinds: Sequence[str]) -> dict[str, list[dict[str, int]]]:
    """Returns, for each kind of model, the peaks of a single process, and then those of each of two processes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in kinds:
            write_models(folder / kind, kind)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
            command = [sys.executable, *start, __file__, str(folder), *kinds]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
            if ended.returncode:
                raise RuntimeError(ended.stderr[-3000:])
        names = ("1-0", "2-0", "2-1")
        return {kind: [json.loads((folder / kind / f"{name}.json").read_text()) for name in names] for kind in kinds}


def run_peaks(kinds: list[str], folder: Path = RESULTS) -> str:
    """Compares the peaks for each kind of model, appends a row for each, and returns the table in Markdown."""
    lines = ["| model | phase | one process | each of two | ratio |", "|---|---|---|---|---|"]
    for kind, (one, *two) in compare(kinds).items():
        for phase in PHASES:
            most = max(each[phase] for each in two)
            row = {"bench": "peaks", "model": kind, "phase": phase, "bytes": one[phase], "bytes_of_two": most}
            append_row({**row, "device": "cpu-x86_64"}, folder)
            lines.append(f"| {kind} | {phase} | {one[phase]:,} | {most:,} | {most / one[phase]:.2f} |")
    return "\n".join(lines)


def _main(folder: Path, kinds: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for kind in kinds:
        peaks = measure(folder / kind, kind)
        (folder / kind / f"{world_size()}-{rank()}.json").write_text(json.dumps(peaks))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
