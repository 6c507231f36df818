"""The trainer's handle on a vLLM process: starts it, sends requests and detects when it dies.

The other side is rollout/vllm_worker.py. Requests and answers are pickled over a socket pair; weights go through shared
memory. The process ignores stop signals; the trainer handles them after its current step. The process exits with the
trainer. It has its own temporary folder, because vLLM leaves files there if it is killed.
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
from tempfile import TemporaryDirectory
from typing import Any

TESTED = "0.32"
"""The version of vLLM with which `make test-vllm` passes."""
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""Prefixes of the environment variables that torchrun sets for the trainer. They are removed from the environment of
the vLLM process, because vLLM would read them as its own."""
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Default environment variables of the vLLM process; the user's values take precedence. They silence vLLM's warnings,
at each update, about weights that no checkpoint contains."""
PATIENCE = 5.0
"""Seconds to wait for a process to exit by itself after its connection is closed; then it is killed."""


class Remote(Exception):
    """Holds the traceback of an error in the vLLM process, as the cause of the error that the trainer raises."""


class Child:
    """A process that serves requests of `vllm_worker.Worker`. It ends when this object is dropped or closed."""

    def __init__(self, memory: int, environment: Mapping[str, str]) -> None:
        """Starts the process. `memory` is the file descriptor of the shared memory; `environment` holds variables that
        are added to the trainer's environment."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OF_TORCHRUN)}
        inherited |= {
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that is started here
        }
        for name, value in QUIET.items():
            inherited.setdefault(name, value)
        self.folder = TemporaryDirectory(prefix="fastrlhf-vllm-", ignore_cleanup_errors=True)
        """Temporary and current folder of the process. It is removed at the end, also if the process or the trainer is
        killed."""
        ours, theirs = Pipe()
        arguments = (theirs.fileno(), memory, os.getpid(), self.folder.name)
        self._process = subprocess.Popen(
            # -P: modules in the current folder do not shadow installed ones.
            [sys.executable, "-P", "-m", "fastrlhf.rollout.vllm_worker", *map(str, arguments)],
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=2,  # to stderr, which keeps the trainer's stdout clean
            pass_fds=(theirs.fileno(), memory),
            start_new_session=True,  # so that Ctrl-C reaches only the trainer
        )
        theirs.close()
        self._connection = ours
        self.close = weakref.finalize(self, _end, self._process, ours, self.folder)
        """Ends the process; it may be called several times."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str, *arguments: Any) -> Any:
        """Calls the method `request` of the process's `Worker` and returns its result."""
        self.send(request, *arguments)
        return self.receive()

    def send(self, request: str, *arguments: Any) -> None:
        """Sends a request without waiting for the result. Call `receive` before the next `send`. Raises ValueError if
        the process has died."""
        try:
            self._connection.send((request, arguments))
        except OSError as error:
            raise ValueError(self._death()) from error

    def receive(self) -> Any:
        """Waits for the result of the last request and returns it. If the process reports an error, raises a ValueError
        or MemoryError with its text; if the process has died, raises ValueError. After any error the process is ended.
        """
        try:
            while not self._connection.poll(1.0):
                if self._process.poll() is not None:
                    raise EOFError
            done, *answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ValueError(self._death()) from error
        except BaseException:
            self.close()  # a late answer would be read as the answer to the next request
            raise
        if done:
            return answer[0]
        self.close()
        error, trace = answer
        if isinstance(error, ImportError):
            raise ValueError(
                f"engine: vllm cannot be used ({error}); pip install 'fastrlhf[vllm]', or set engine to transformers"
            ) from Remote(trace)
        kind = MemoryError if isinstance(error, MemoryError) else ValueError
        raise kind(f"engine: vllm {error}") from Remote(trace)

    def _death(self) -> str:
        """Returns an error message that says how the process ended."""
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


def _end(process: subprocess.Popen[bytes], connection: Connection, folder: TemporaryDirectory[str]) -> None:
    connection.close()  # a process that waits for a request then exits
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.cleanup()
