"""`fastrlhf inspect ... | head`: who reads the output may go when it has seen enough, which is nobody's mistake."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 141
"""As the shell tells of a program that SIGPIPE has ended."""

STDOUT = 1
"""The file descriptor."""


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Raises SystemExit where what is printed within it has lost its reader; what is left to print is dropped.

    A broken pipe that is not standard output is raised as it is. The signal itself is left alone: it would end a run
    for any connection that a library loses.
    """
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # or the flush at exit complains again
        raise SystemExit(EXIT_CODE) from None


def _is_unread() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # errors are told unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))
