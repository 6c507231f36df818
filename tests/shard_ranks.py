"""The program of the two processes that tests/models/test_shards.py starts.

torchrun --nproc-per-node 2 tests/shard_ranks.py FOLDER

FOLDER/one holds checkpoint-1 of a single process. The two processes write their checkpoints to FOLDER/two and their
observations to FOLDER/rank-0.json and FOLDER/rank-1.json. Finally the second process is killed while it saves
checkpoint-3.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastrlhf.config import SFTConfig
from fastrlhf.distributed.ranks import start
from fastrlhf.models import shards
from fastrlhf.models.sharding import full, like, shard
from fastrlhf.runtime.checkpoint import Checkpointer
from fastrlhf.runtime.optim import Optimizer
from tests import tiny

CONFIG = SFTConfig(dtype="bfloat16", max_grad_norm=0.0, learning_rate=1e-2, device="cpu")


class Trained:
    """A bfloat16 policy, a critic whose head is a single row (held by one of two processes), and their optimiser."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        settings = tiny.model_config("qwen3")
        settings.num_labels = 1
        critic = AutoModelForSequenceClassification.from_config(settings)
        self.models: dict[str, PreTrainedModel] = {"": tiny.policy("qwen3").bfloat16(), "value_model": critic}
        for model in self.models.values():
            shard(model)
        named = {"": self.models[""], "value/": critic}
        self.optimizer = Optimizer(named, CONFIG, num_steps=9)
        folder.mkdir(exist_ok=True)
        parts = {"optimizer": self.optimizer}
        self.checkpointer = Checkpointer(folder, self.models, tiny.tokenizer(), parts, {"train": "3 rows"})

    def step(self) -> None:
        """Takes an optimiser step with gradients that are bit-identical for any number of processes."""
        generator = torch.Generator().manual_seed(self.optimizer.num_done)
        for model in self.models.values():
            for weight in model.parameters():
                weight.grad = like(weight, torch.randn(weight.shape, generator=generator).to(weight.dtype))
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Returns the full (unsharded) weights and optimiser state."""
        state = {f"{at}/{name}": x for at, model in self.models.items() for name, x in model.state_dict().items()}
        state |= self.optimizer.state_dict()
        return {name: full(value).clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Returns whether two states have equal keys, dtypes and bits."""
    return left.keys() == right.keys() and all(
        x.dtype == right[name].dtype and torch.equal(x, right[name]) if isinstance(x, Tensor) else x == right[name]
        for name, x in left.items()
    )


def main(place: Path) -> None:
    torch.set_num_threads(1)
    shards.FILE = 2**15  # makes each process write several files of moments
    start(CONFIG)
    rank, gathers, gather = dist.get_rank(), [], DTensor.full_tensor

    def counted(tensor: DTensor) -> Tensor:
        gathers.append(tensor)
        return gather(tensor)

    DTensor.full_tensor = counted
    trained = Trained(place / "two")
    trained.step()
    path = trained.checkpointer.save(1)
    resumed, from_one = Trained(place / "two"), Trained(place / "one")
    seen: dict[str, Any] = {"steps": [resumed.checkpointer.load(), from_one.checkpointer.load()]}
    seen["gathers"] = len(gathers) - 2  # the two gathers of the gradient norms do not count
    expected = trained.state()
    seen["resumed"], seen["from_one"] = same(resumed.state(), expected), same(from_one.state(), expected)
    for each in (trained, resumed):
        each.step()
    seen["next step"] = same(resumed.state(), trained.state())

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        trained.checkpointer.save(2)
    except OSError as error:
        seen["full"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    seen["left"] = sorted(file.name for file in path.parent.iterdir())
    (place / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()

    def killed(descriptor: int) -> None:
        (place / "written").write_text(os.readlink(f"/proc/self/fd/{descriptor}"))
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        os.fsync = killed
    trained.checkpointer.save(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
