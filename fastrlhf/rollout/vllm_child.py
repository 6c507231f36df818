"""A process with a vLLM engine, as the trainer sees it: it is started, asked, and its death noticed.

The other side is rollout/vllm_worker.py. Requests and answers are pickled over a socket pair; weights go through shared
memory. The process ignores requests to stop, which the trainer obeys after its step, and ends with the trainer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

TESTED = "0.32"
"""The version of vLLM with which `make test-vllm` passes."""
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""Beginnings of the environment variables of the trainer's process group, which vLLM would take for its own."""
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Environment variables that have these values unless the user sets them. At each update vLLM would warn of weights
that no checkpoint has."""
PATIENCE = 5.0
"""Seconds that a process is given to end by itself after its connection is closed."""


class Remote(Exception):
    """The traceback of an error in the vLLM process; the cause of the error that the trainer raises."""


class Child:
    """A process that serves requests of `vllm_worker.Worker`. It ends when this object is dropped or closed."""

    def __init__(self, memory: int, environment: Mapping[str, str]) -> None:
        """`memory` is the file descriptor of the shared memory. `environment` are the variables that the process has
        beside those of the trainer."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OF_TORCHRUN)}
        inherited |= {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that is started here
        }
        for name, value in QUIET.items():
            inherited.setdefault(name, value)
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            # -P: modules in the current folder do not shadow installed ones.
            [sys.executable, "-P", "-m", "fastrlhf.rollout.vllm_worker"]
            + [str(number) for number in (theirs.fileno(), memory, os.getpid())],
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=2,  # the trainer's own output is for its reader
            pass_fds=(theirs.fileno(), memory),
            start_new_session=True,  # so that Ctrl-C reaches only the trainer
        )
        theirs.close()
        self._connection = ours
        self.close = weakref.finalize(self, _end, self._process, ours)
        """Ends the process; it may be called several times."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str, *arguments: Any) -> Any:
        """Sends a request, by the name of a method of `Worker`, and waits for its result."""
        self.send(request, *arguments)
        return self.receive()

    def send(self, request: str, *arguments: Any) -> None:
        """Sends a request whose result must be fetched by `receive` before the next one is sent. Raises ValueError if
        the process has died."""
        try:
            self._connection.send((request, arguments))
        except OSError as error:
            raise ValueError(self._death()) from error

    def receive(self) -> Any:
        """The result of the last request. Raises ValueError, or MemoryError, with the text of an error in the process,
        and ValueError if the process has died. After an error the process is ended."""
        try:
            while not self._connection.poll(1.0):
                if self._process.poll() is not None:
                    raise EOFError
            done, *answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ValueError(self._death()) from error
        except BaseException:
            self.close()  # a late answer would be taken for that of the next request
            raise
        if done:
            return answer[0]
        self.close()
        error, trace = answer
        if isinstance(error, ImportError):
            raise ValueError(
                f"engine: vllm cannot be used ({error}); pip install 'fastrlhf[vllm]', or take engine transformers"
            ) from Remote(trace)
        kind = MemoryError if isinstance(error, MemoryError) else ValueError
        raise kind(f"engine: vllm {error}") from Remote(trace)

    def _death(self) -> str:
        """One line that says how the process ended."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code is None:
            how = "closed its connection"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        memory = " (the kernel does so when memory is short)" if code == -signal.SIGKILL else ""
        return (
            f"engine: the vLLM process {self.pid} {how}{memory}; its own messages, if any, are above. If memory was "
            "short, lower vllm_gpu_memory_utilization or rollout_batch_size"
        )


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()  # which ends a process that waits for a request
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
