"""Handles stop signals: after Ctrl-C, SIGTERM or a scheduler's signal, a run saves its progress and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Self

REPEAT = 5.0
"""Signals that follow the first one within this many seconds belong to the same request. SLURM and systemd signal every
process of a job, a terminal signals the whole process group, and torchrun also forwards its own signals to its workers,
so a rank receives one request twice within milliseconds."""
AS_TERM = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that are handled like SIGTERM: SIGHUP after a lost connection, and SIGUSR1 and SIGUSR2, which `sbatch
--signal` may send before the time limit."""
HANDLED = (signal.SIGINT, signal.SIGTERM, *AS_TERM)


SAVING = f"saving, then stopping; a second signal after {REPEAT:g} s stops at once"
"""What a run prints after the first signal."""
IN_THE_MIDDLE = "in the middle of a step"
"""Value of `Interrupted.when` after a second request, which ends a run without saving."""


class Interrupted(KeyboardInterrupt):
    """Raised when a run stops on request; `when` says at which point it stopped and what was saved. `finished`: the
    request came after the last step, and the run is complete."""

    def __init__(self, number: int, when: str = "", finished: bool = False) -> None:
        super().__init__(number, when, finished)
        self.when, self.finished = when, finished
        self.exit_code = 128 + number
        """Exit code by the convention of shells: 130 after Ctrl-C, 143 after SIGTERM and the signals handled like it.
        """

    def __str__(self) -> str:
        return f"interrupted {self.when}".rstrip()


class Interrupts:
    """Context that handles the signals in `HANDLED`. The first signal is stored in `pending`, as SIGINT or SIGTERM, and
    raises Interrupted if `may_raise` returns True at that moment. Signals within the next `REPEAT` seconds are ignored.
    A later signal always raises Interrupted, with `IN_THE_MIDDLE`. `told` is printed after the first signal.

    If the block ends without an error while a signal is pending, the signal is raised again for the previous handler.
    Outside the main thread no signals are handled, because Python does not deliver them there. Signals that the process
    already ignores, for example under nohup, stay ignored.
    """

    def __init__(self, may_raise: Callable[[], bool] = lambda: False, told: str = SAVING) -> None:
        self.pending: int | None = None
        self._first = 0.0
        self._may_raise, self._told = may_raise, told
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

    def raise_late(self) -> None:
        """Raises Interrupted if a signal arrived earlier, when that was not possible, and it is possible now."""
        if self.pending and self._may_raise():
            raise Interrupted(self.pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number in AS_TERM else number
        if self.pending is None:
            self.pending, self._first = number, time.monotonic()
            # os.write instead of print, because the signal may have interrupted a print.
            os.write(2, f"\n{self._told}\n".encode())
            if self._may_raise():
                raise Interrupted(number)
        elif time.monotonic() - self._first > REPEAT:
            raise Interrupted(number, IN_THE_MIDDLE)


def stop_at_once() -> AbstractContextManager[object]:
    """Returns a context for work with nothing to save: every signal in `HANDLED` raises Interrupted at once, so that
    locks are released and the exit code is that of a stopped run. Within the context a `Run` handles signals itself.
    Under torchrun signals keep their default, which ends even a rank that waits for another in C++ code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return nullcontext()
    return Interrupts(lambda: True, "stopping")
