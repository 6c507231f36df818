"""Ctrl-C and SIGTERM during training: the step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has; the message says when."""

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"interrupted {when}")
        self.exit_code = 128 + number
        """As a shell reports it: 130 after Ctrl-C, 143 after SIGTERM."""


class Interrupts:
    """Within it the first SIGINT or SIGTERM is only kept in `pending`; the second one raises Interrupted at once.

    One that is still pending when the block has ended well is delivered then. Outside the main thread, where Python
    hands out no signals, nothing changes; nor does a signal that the process was told to ignore.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
        if self.pending:
            raise Interrupted(number, "in the middle of a step")
        self.pending = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nfinishing this step, then saving; once more ends at once\n")
