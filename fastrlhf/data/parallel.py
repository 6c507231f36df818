"""Calls a function for many numbers in forked processes, which inherit all data of this process, and yields the results
in order."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


def default_processes(share: int = 1) -> int:
    """Returns one process per CPU core that this process may use, for each of `share` equal users of the cores; at
    least 2, because memory that a forked process has used goes back to the system. 1 where processes cannot be
    forked safely."""
    return max(2, len(os.sched_getaffinity(0)) // share) if sys.platform == "linux" else 1


def return_memory() -> None:
    """Returns freed memory to the system, as far as the C library can; glibc keeps it otherwise."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def in_order(function: Callable[[int], T], num: int, processes: int) -> Iterator[T]:
    """Yields function(0), ..., function(num - 1). With `processes` > 1 they are computed in that many forked processes;
    results must be picklable, and `function` must neither use a GPU nor change data that the caller reads later.

    An exception of `function` is raised here in its place. Raises RuntimeError if a process dies. The processes end
    with the iterator, and if this process dies.
    """
    processes = min(processes, num)
    if processes <= 1:
        yield from map(function, range(num))
        return
    context = multiprocessing.get_context("fork")
    receivers: list[Connection] = []
    workers = []
    try:
        for worker in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            receivers.append(receiver)
            own = range(worker, num, processes)
            process = context.Process(target=_work, args=(function, own, sender, list(receivers)), daemon=True)
            with warnings.catch_warnings():  # threads of libraries are not used in the forked processes
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            workers.append(process)
            sender.close()
        for i in range(num):
            try:
                value, error = receivers[i % processes].recv()
            except EOFError:
                process = workers[i % processes]
                process.join()
                raise RuntimeError(
                    f"a process that tokenises rows has died with exit code {process.exitcode}, perhaps for lack of "
                    "memory; set dataset_num_proc to 1"
                ) from None
            if error is not None:
                raise error
            yield value
    finally:
        for process in workers:
            process.kill()
            process.join()
        for receiver in receivers:
            receiver.close()


def _work(function: Callable[[int], Any], numbers: range, sender: Connection, inherited: list[Connection]) -> None:
    """Sends (value, error) for each number. When the parent process has died, sending fails and the process ends."""
    for receiver in inherited:
        receiver.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the Rust library do not survive a fork
    try:
        for number in numbers:
            try:
                sender.send((function(number), None))
            except (BrokenPipeError, KeyboardInterrupt):
                return
            except Exception as error:
                sender.send((None, _sendable(error)))
                return
    finally:
        os._exit(0)  # exit handlers belong to the parent process


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
