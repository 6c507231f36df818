"""Lets several processes train as one: `torchrun --nproc-per-node 8 -m fastrlhf COMMAND ...`, with one process per GPU.

Every rank reads the same data in the same order and knows the whole plan of a step, all rows of its batch. Only
expensive work is divided: each rank computes its part of the micro-batches, of the responses and of the scores, and the
ranks exchange the results, so that all of them hold the same numbers. All ranks then compute the same rewards,
whitening, KL coefficient and early stops. Before that, `compare` refuses ranks with different settings or data. Only
rank 0 writes files, except for the parts of a checkpoint.

In a single process, these functions return their input unchanged.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.config import TrainConfig, require
from fastrlhf.config.batch import processes
from fastrlhf.config.paths import as_given

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a rank with an error waits for the other ranks to raise the same error."""

late_signals: list[Callable[[], None]] = []
"""Functions that raise the exception of a signal that arrived while no exception could be raised."""

_apart = False
"""Whether this rank runs code during which no rank waits for another (`apart`, `on_first`, `on_each`)."""


def start(config: TrainConfig) -> None:
    """Connects the processes that torchrun has started, if any: by gloo on CPUs and NCCL on GPUs. LOCAL_RANK chooses
    the GPU of a rank.

    Raises ValueError for settings that several processes do not support yet, and if ranks differ in a key of the
    configuration or in the version of torch, transformers or fastrlhf.
    """
    world = processes()
    if world == 1:
        return
    rule = f"False in {world} processes, among which weights in 4 bits cannot be spread"
    require(not config.load_in_4bit, "load_in_4bit", True, rule)
    rule = f"float32 in {world} processes, which cannot measure the shift"
    require(config.merged_dtype == "float32", "merged_dtype", config.merged_dtype, rule)
    rows = config.batch_size
    require(rows % world == 0, config.batch_key, rows, f"a multiple of the {world} processes")
    require(
        config.device in ("auto", "cpu", "cuda"), "device", config.device, f"auto, cpu or cuda in {world} processes"
    )
    if not dist.is_initialized():
        _join(config)
    compare(as_given(config), "configuration")  # hosts may keep files in different places
    compare({name: _version(name) for name in ("torch", "transformers", "fastrlhf")}, "version")


def _version(package: str) -> str:
    module = sys.modules.get(package)
    return str(getattr(module, "__version__", "none"))


def _join(config: TrainConfig) -> None:
    backend = "gloo"
    if config.device != "cpu" and torch.cuda.is_available():
        world = processes()
        rule = "1, or set by torchrun, which sets LOCAL_RANK too"
        require("LOCAL_RANK" in os.environ, "WORLD_SIZE", world, rule)
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(place < gpus, "WORLD_SIZE", world, f"{gpus} processes on this machine at most, one per GPU")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"  # exchanges of Python objects go through gloo and do not wait for a GPU
    dist.init_process_group(backend)
    atexit.register(dist.destroy_process_group)


def check_one_process(what: str) -> None:
    """Raises ValueError if torchrun has started several processes."""
    if processes() > 1:
        raise ValueError(f"WORLD_SIZE: {what} runs in one process; start it without torchrun")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def may_unwind() -> bool:
    """Returns whether an exception raised by a signal handler now would reach every rank. With several ranks this is
    the case only inside `apart`, `unwinding`, `on_first` and `on_each`."""
    return world_size() == 1 or _apart


@contextmanager
def apart() -> Iterator[None]:
    """Context in which the ranks exchange nothing. An error or a KeyboardInterrupt on any rank is raised on every rank
    at the end of the block. Every rank must enter it."""
    error = None
    try:
        with unwinding():
            yield
    except (Exception, KeyboardInterrupt) as raised:
        error = raised
    raise_first(error)


@contextmanager
def unwinding() -> Iterator[None]:
    """Context in which an exception of a signal handler may be raised, because the ranks exchange nothing except
    between `forbid_unwinding` and `allow_unwinding`. The caller sends the exception to the other ranks."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def forbid_unwinding() -> None:
    """Begins an exchange within `unwinding`."""
    global _apart
    _apart = False


def allow_unwinding() -> None:
    """Ends an exchange within `unwinding`, and raises the exception of a signal that came meanwhile."""
    global _apart
    _apart = True
    for raise_late in late_signals:
        raise_late()


def raise_first(error: BaseException | None) -> None:
    """Raises, on every rank, the error of the first rank that has one. Every rank must call it."""
    for place, other in enumerate(from_all(None if error is None else _sendable(error))):
        if other is not None:
            raise error if error is not None and place == rank() else other


def on_first(function: Callable[[], T]) -> T:
    """Calls `function` only on rank 0 and returns its value on every rank; an error is raised on every rank. All ranks
    wait until the call has ended."""
    if world_size() == 1:
        return function()
    outcome: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if is_first():
        outcome = [_outcome(function)]
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, value)


def on_each(function: Callable[[], T]) -> list[T]:
    """Calls `function` on each rank and returns the list of values by rank. If any rank fails, the error of the first
    failed rank is raised on every rank."""
    if world_size() == 1:
        return [function()]
    outcomes = from_all(_outcome(function))
    for _, error in outcomes:
        if error is not None:
            raise error
    return [cast(T, value) for value, _ in outcomes]


def together(function: Callable[[], T]) -> T:
    """Calls `function`, which must not communicate, on each rank and returns the rank's own value. If any rank fails,
    every rank raises the error of the first failed rank, so that no rank waits for a failed one."""
    if world_size() == 1:
        return function()
    own: list[T] = []
    on_each(lambda: own.append(function()))
    return own[0]


def from_all(value: T) -> list[T]:
    """Returns the values of all ranks, by rank."""
    values: list[T] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def compare(mine: Mapping[str, object], what: str) -> None:
    """Raises ValueError on every rank if a rank and rank 0 have different values for a key; `what` names the kind of
    values in the message. Every rank must call it."""
    if world_size() == 1:
        return
    first, *others = from_all((socket.gethostname(), dict(mine)))
    for rank, (host, theirs) in enumerate(others, start=1):
        for key in {**first[1], **theirs}:
            here, there = (values.get(key, "absent") for values in (first[1], theirs))
            if here != there:
                raise ValueError(
                    f"{key}: the {what} of rank {rank} on {host} is {there!r}, but that of rank 0 on {first[0]} is "
                    f"{here!r}; start every process with the same value"
                )


def failed_together(error: BaseException, step: int) -> bool:
    """Returns whether every rank has raised the same error in the same step, so that ranks can still communicate. This
    is the case for errors of `on_first` and `on_each` and for errors about numbers that all ranks share. If other ranks
    do not raise the error, the call returns False after `PATIENCE` seconds."""
    if world_size() == 1:
        return True
    digest = hashlib.sha256(f"{step} {type(error).__name__} {error}".encode()).hexdigest()
    key, world, deadline = f"fastrlhf/failed/{digest}", world_size(), time.monotonic() + PATIENCE
    try:
        store = dist.distributed_c10d._get_default_store()
        number = store.add(key, 1)  # a process may raise the same error in several consecutive runs
        needed = -(-number // world) * world
        while store.add(key, 0) < needed:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    except Exception:  # the process that keeps the store has ended, so the run has ended
        return False
    return True


def total(values: Tensor) -> Tensor:
    """Returns the sum over ranks, element by element."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values: Tensor) -> Tensor:
    """Returns the maximum over ranks, element by element."""
    return _reduced(values, dist.ReduceOp.MAX)


def smallest(value: int) -> int:
    """Returns the minimum over ranks. The ranks exchange it on the CPU, without waiting for a GPU."""
    least = torch.tensor([value])
    if world_size() > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def gathered(rows: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, in rank order: [n, ...] -> [N, ...]. Ranks may have different numbers of
    rows."""
    return torch.cat(by_rank(rows)) if world_size() > 1 else rows


def by_rank(rows: Tensor) -> list[Tensor]:
    """Returns the rows [n, ...] of every rank, in rank order. Ranks may have different numbers of rows."""
    if world_size() == 1:
        return [rows]
    counts = from_all(len(rows))
    mine = rows.new_zeros(max(counts), *rows.shape[1:])
    mine[: len(rows)] = rows
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this rank's contiguous part of the items; concatenated in rank order, the parts are all items."""
    world, own = world_size(), rank()
    return items[len(items) * own // world : len(items) * (own + 1) // world]


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Calls a function and returns (value, None) or (None, error). Errors of every class are caught, because an error
    that is not sent to the other ranks would make them wait forever."""
    global _apart
    before = _apart
    try:
        _apart = True
        value = function()
        _apart = before
        return value, None
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        _apart = before
        return None, _sendable(error)


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # user-defined functions raise errors of any class
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, operation)
    return values
