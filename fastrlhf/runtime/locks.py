"""Keeps two runs from using the same folder, by a lock of the operating system and by a lock file, which processes on
other hosts see.

The operating system releases its lock when the process ends, but on many network file systems such locks work only
within one host or not at all. The lock file names host, process and job, and its owner rewrites it every `BEAT`
seconds. If there is a lock file of another host, it is watched for `WATCH` seconds: if it changes, its run is alive;
otherwise the run is dead and the file is deleted. Clocks of different hosts are not compared.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = ".lock"
BEAT, WATCH = 10.0, 35.0
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
"""Environment variables in which schedulers store the id of a job."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context that locks an existing folder for this run. Raises ValueError if another run has locked it."""
    with _kernel_lock(folder):
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job()}
        try:
            descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            raise ValueError(_refusal(folder, _read(folder))) from None
        with os.fdopen(descriptor, "w") as file:
            json.dump(mine | {"beat": 0}, file)
        ended = threading.Event()
        beats = threading.Thread(target=_beat, args=(folder, mine, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            if _same(_read(folder), mine):
                (folder / LOCK).unlink(missing_ok=True)


def check_idle(path: str) -> None:
    """Raises ValueError if another run is training in the folder."""
    if Path(path).exists():
        with _kernel_lock(Path(path)):
            pass


@contextmanager
def _kernel_lock(folder: Path) -> Iterator[None]:
    """Context that holds the operating system's lock on a folder, if the file system has locks. Raises ValueError if
    another run holds it or has a lock file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_locks = True
        except BlockingIOError:
            raise ValueError(_refusal(folder, _read(folder))) from None
        except OSError as error:  # ENOSYS, ENOLCK, EBADF, ENOTSUP
            has_locks = False
            log.warning(
                "%s: this file system has no locks (%s); only the lock file protects the folder from other runs",
                folder,
                error,
            )
        _clear_dead(folder, has_locks)
        yield
    finally:
        os.close(descriptor)


def _clear_dead(folder: Path, has_locks: bool) -> None:
    """Deletes the lock file of a dead run. Raises ValueError if the run is alive."""
    found = _read(folder)
    if not found and not (folder / LOCK).exists():
        return
    if not (has_locks and found.get("host") == socket.gethostname()):  # a live run on this host would hold the lock
        log.warning("%s: a lock file of %s; watching for %g s whether it is alive", folder, _owner(found), WATCH)
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(BEAT / 10)
            if (now := _read(folder)) and now != found:
                raise ValueError(_refusal(folder, now))
        log.warning("%s: that run is dead; its lock file is deleted", folder)
    (folder / LOCK).unlink(missing_ok=True)


def _refusal(folder: Path, found: dict[str, object]) -> str:
    owner = f" ({_owner(found)})" if found else ""
    return f"output_dir: another run is training in {str(folder)!r}{owner}; choose another folder"


def _owner(found: dict[str, object]) -> str:
    job = f", job {found['job']}" if found.get("job") else ""
    return f"process {found.get('pid')} on {found.get('host')}{job}"


def _beat(folder: Path, mine: dict[str, object], ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT):
        count += 1
        try:
            if _same(_read(folder), mine):
                _write(folder, mine | {"beat": count})
        except OSError:  # a full disk: the next beat tries again
            continue


def _write(folder: Path, content: dict[str, object]) -> None:
    partial = folder / f"{LOCK}.partial"
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, folder / LOCK)


def _read(folder: Path) -> dict[str, object]:
    """Returns the content of the lock file; empty if there is none or it cannot be read."""
    try:
        found = json.loads((folder / LOCK).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(found: dict[str, object], mine: dict[str, object]) -> bool:
    return all(found.get(key) == value for key, value in mine.items())


def _job() -> str:
    return next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), "")
