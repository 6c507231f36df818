"""Requests to stop: Ctrl-C, SIGTERM and the signals of schedulers end a run as soon as its progress can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

REPEAT = 5.0
"""Seconds within which further signals are the same request. SLURM and systemd signal every process of a job, torchrun
forwards to its workers what it receives itself, and a terminal signals the whole process group: each rank receives the
same request twice within milliseconds."""
AS_TERM = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that count as SIGTERM: a lost connection, and `sbatch --signal`, which warns before the time limit."""
HANDLED = (signal.SIGINT, signal.SIGTERM, *AS_TERM)


IN_THE_MIDDLE = "in the middle of a step"
"""What Interrupted says after a second request, which ends a run without saving."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has stopped; `when` says at which point, and what was saved."""

    def __init__(self, number: int, when: str = "") -> None:
        super().__init__(number, when)
        self.when = when
        self.exit_code = 128 + number
        """As a shell reports it: 130 after Ctrl-C, 143 after SIGTERM and the signals that count as SIGTERM."""

    def __str__(self) -> str:
        return f"interrupted {self.when}"


class Interrupts:
    """Context in which the first signal of `HANDLED` is kept in `pending`, as SIGINT or SIGTERM, and raises Interrupted
    if `may_raise` returns True at that moment. Another signal within `REPEAT` seconds is the same request; a later one
    raises Interrupted with `IN_THE_MIDDLE` in any case.

    A signal that is still pending when the block ends without an error is delivered then. Outside the main thread,
    where Python delivers no signals, nothing changes; a signal that the process ignores (under nohup) stays ignored.
    """

    def __init__(self, may_raise: Callable[[], bool] = lambda: False) -> None:
        self.pending: int | None = None
        self._first = 0.0
        self._may_raise = may_raise
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] (what signal.signal returned)
        if kind is None and self.pending:
            signal.raise_signal(self.pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number in AS_TERM else number
        if self.pending is None:
            self.pending, self._first = number, time.monotonic()
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\nsaving, then stopping; again after {REPEAT:g} s ends at once\n".encode())
            if self._may_raise():
                raise Interrupted(number)
        elif time.monotonic() - self._first > REPEAT:
            raise Interrupted(number, IN_THE_MIDDLE)
