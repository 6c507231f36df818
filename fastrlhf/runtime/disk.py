"""Checks that the disk has room for what a run saves, before the run and before every save, and waits for free
space."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastrlhf.distributed.ranks import on_first

log = logging.getLogger(__name__)

GIB = 2**30
PAUSE = 10.0
"""Seconds between two checks of a full disk."""


class DiskFull(OSError):
    """The disk has no room for a file or folder; the message names the folder and the bytes."""


def is_full(error: BaseException) -> bool:
    """Returns whether an error means that a disk is full or a quota is used up. Errors of safetensors are recognised by
    their message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, DiskFull) or any(f"os error {code})" in str(error) for code in (28, 122))


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises DiskFull if the file system of `folder`, which need not exist yet, has fewer than `needed` bytes free."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    if usage.total and usage.free < needed:  # some file systems report no sizes
        raise DiskFull(f"{what} needs {size(needed)}, but {str(folder)!r} has {size(usage.free)} free")


def with_room(
    write: Callable[[], None],
    *,
    folder: Path,
    needed: int,
    what: str,
    minutes: float,
    make_room: Callable[[], bool] = lambda: False,
) -> None:
    """Calls `write` as soon as there is room for it, and again if it fails because the disk is full. If there is too
    little room, `make_room` may delete something and return True; if it returns False, the run waits up to `minutes`
    and then raises DiskFull with advice. Every rank must call it, with a `write` that fails on all ranks or on none.
    """
    clock = _Clock(minutes)
    while True:
        try:
            on_first(lambda: check_room(folder, needed, what))
            write()
            return
        except OSError as error:
            if not is_full(error):
                raise
            short = str(error)
        if on_first(make_room):
            continue
        if on_first(partial(clock.is_over, short)):
            raise DiskFull(f"{short}; free some space, then start the same command again")
        time.sleep(PAUSE)


class _Clock:
    """A deadline whose time starts at the first call of `is_over`."""

    def __init__(self, minutes: float) -> None:
        self._minutes, self._end = minutes, -1.0

    def is_over(self, short: str) -> bool:
        if self._end < 0:
            self._end = time.monotonic() + 60 * self._minutes
            if self._minutes:
                log.warning("%s; waiting up to %g minutes (disk_wait_minutes) for room", short, self._minutes)
        return time.monotonic() >= self._end


def size(num_bytes: int) -> str:
    """Formats a size, for example "1.50 GiB" or, below 0.01 GiB, "740,000 bytes"."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes:,} bytes"
