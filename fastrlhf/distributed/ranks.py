"""Several processes that train as one: `torchrun --nproc-per-node 8 -m fastrlhf COMMAND ...`, one process per GPU.

Every rank reads the same data in the same order and knows the whole plan of a step; the batch size is that of the step.
Only what costs is shared out: each rank computes its part of the micro-batches, of the prompts to answer, of the
responses to judge, and what comes of it is exchanged until every rank holds the same numbers. So whatever decides
anything (rewards, whitening, a KL coefficient, an early stop) is computed by all of them alike. The first alone writes,
but for the parts of a checkpoint.

In one process every function here gives back what it is given.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.config import TrainConfig, require

T = TypeVar("T")


def start(config: TrainConfig) -> None:
    """Joins the processes that torchrun has started, if it has: gloo between CPUs, NCCL between GPUs, of which each
    rank takes the one of its place on the machine.

    Raises ValueError for what more than one process cannot do yet.
    """
    world = max(_launched(), world_size())
    if world == 1:
        return
    rule = f"False in {world} processes, among which weights in 4 bits cannot be spread"
    require(not config.load_in_4bit, "load_in_4bit", True, rule)
    require(
        config.batch_size % world == 0,
        "per_device_train_batch_size",
        config.per_device_train_batch_size,
        f"such that the batch of an optimiser step, {config.batch_size} in all, is a multiple of the {world} processes",
    )
    require(
        config.device in ("auto", "cpu", "cuda"), "device", config.device, f"auto, cpu or cuda in {world} processes"
    )
    if dist.is_initialized():
        return
    backend = "gloo"
    if config.device != "cpu" and torch.cuda.is_available():
        rule = "1, or set by torchrun, which sets LOCAL_RANK too"
        require("LOCAL_RANK" in os.environ, "WORLD_SIZE", world, rule)
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(place < gpus, "WORLD_SIZE", world, f"{gpus} processes on this machine at most, one per GPU")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"  # what the hosts tell each other does not wait for a GPU
    dist.init_process_group(backend)
    atexit.register(dist.destroy_process_group)


def check_one_process(what: str) -> None:
    """Raises ValueError where torchrun has started more."""
    if _launched() > 1:
        raise ValueError(f"WORLD_SIZE: {what} runs in one process; start it without torchrun")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return world_size() == 1 or dist.get_rank() == 0


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns on the first rank, the only one that calls it, on every rank; or the error it raises
    there. Nobody goes on before it has ended."""
    if world_size() == 1:
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_first():
        try:
            outcome = [(function(), None)]
        except Exception as error:  # whatever it is, the others would wait for ever
            outcome = [(None, _sendable(error))]
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, value)


def on_each(function: Callable[[], T]) -> list[T]:
    """What `function` returns on each rank, by rank; or, on all of them, the first error that it raises on any."""
    if world_size() == 1:
        return [function()]
    outcome: tuple[T | None, Exception | None] = (None, None)
    try:
        outcome = (function(), None)
    except Exception as error:
        outcome = (None, _sendable(error))
    outcomes = from_all(outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [cast(T, value) for value, _ in outcomes]


def from_all(value: T) -> list[T]:
    """What each rank has, by rank."""
    values: list[T] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """The sum over ranks, element by element."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values: Tensor) -> Tensor:
    """The maximum over ranks, element by element."""
    return _reduced(values, dist.ReduceOp.MAX)


def gathered(rows: Tensor) -> Tensor:
    """[N, ...] from [n, ...]: the rows of all ranks, by rank. Their numbers may differ."""
    if world_size() == 1:
        return rows
    counts = from_all(len(rows))
    mine = rows.new_zeros(max(counts), *rows.shape[1:])
    mine[: len(rows)] = rows
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of this rank: neighbours stay together, and in rank order the parts are the whole."""
    world = world_size()
    rank = dist.get_rank() if world > 1 else 0
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def _sendable(error: Exception) -> Exception:
    try:
        pickle.dumps(error)
    except Exception:  # of any class that a judge of the user's may have
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _launched() -> int:
    """The processes that torchrun says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, operation)
    return values
