"""Files and folders that are either complete or absent, whenever a process or the machine stops.

Several processes fill a folder together, on a file system that all of them see, and each computes its share of the
hashes: every rank must make the calls whose docstrings say so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from fastrlhf.distributed.ranks import is_first, on_each, on_first, share
from fastrlhf.runtime.disk import DiskFull, is_full

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
"""Error numbers of file systems that cannot flush a folder."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` from the files that `fill` writes into the path it is called with, and adds a manifest of sizes
    and hashes.

    Everything is flushed to the disk in a hidden folder beside it, which is then renamed; a folder of that name is
    replaced. Raises OSError (DiskFull where the disk is full) and leaves nothing behind if a file cannot be written.
    Every rank must call it; each calls `fill`, which must fail on all ranks or on none.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        on_first(lambda: _make_empty(partial))
        fill(partial)
        # On a network file system a rank is sure to see only its own files at once.
        names = sorted({name for seen in on_each(lambda: _names(partial)) for name in seen})
        entries = on_each(lambda: {name: _entry(partial / name) for name in share(names)})
        on_first(lambda: _publish(partial, folder, entries))
    except BaseException as error:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise (DiskFull if is_full(error) else OSError)(f"{str(folder)!r} cannot be written: {error}") from error
        raise


def write_file(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a file and makes its parent folders; an existing file is replaced. `errors`: as in `str.encode`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Makes the files of a new folder, text by name. The last one marks the folder as whole: all are flushed under
    hidden names before the first gets its own. `sweep_files` deletes what a kill left."""
    partial = {name: folder / f".{name}.partial" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial[name].write_text(text, encoding="utf-8")
            flush(partial[name])
        for name, file in partial.items():
            os.replace(file, folder / name)
    except BaseException:
        sweep_files(folder, texts)
        raise
    flush(folder)


def sweep_files(folder: Path, names: Iterable[str]) -> None:
    """Deletes the files that a kill during `write_files` left: as long as the last one has its hidden name, those
    before it are not whole."""
    *others, mark = names
    if (folder / f".{mark}.partial").exists():
        for name in others:
            (folder / name).unlink(missing_ok=True)
    for name in (*others, mark):
        (folder / f".{name}.partial").unlink(missing_ok=True)


def check_writable(path: str, key: str) -> None:
    """Raises ValueError, naming `key`, if the folder cannot be made or cannot be written to. Leaves nothing behind."""
    try:
        place = Path(path)
        while not place.exists():
            if place.is_symlink():
                raise ValueError(f"{key}: {path!r} cannot be made: {str(place)!r} is a link to nothing")
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{key}: {path!r} cannot be made: {str(place)!r} is a file")
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{key}: {path!r} cannot be written to: {error.strerror}") from error


def check_folder(folder: Path, needs: Callable[[str], bool] = lambda name: True) -> None:
    """Raises ValueError, naming the file, if a file of the manifest is missing or has changed since it was written.
    Only files whose relative names `needs` accepts are read. Every rank must call it.
    """
    files = on_first(lambda: {name: entry for name, entry in _read_manifest(folder).items() if needs(name)})
    on_each(lambda: [_check(folder, name, *files[name]) for name in share(list(files))])


def discard_folder(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that no half of it is ever found under its own name."""
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def sweep(folder: Path, names: str) -> None:
    """Deletes folders that a killed process has left half written or half deleted in `folder`; only those whose names
    match the glob pattern `names`."""
    for what in ("partial", "discarded"):
        for path in folder.glob(f".{names}.{what}"):
            shutil.rmtree(path)


def flush(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk. Some file systems cannot flush a folder;
    a warning says once that a power failure may then lose what was just saved."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH or not path.is_dir():
            raise
        _warn_once("the file system cannot flush folders (%s): a power failure may lose a checkpoint", error.strerror)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and gives the files the permissions that the umask asks for:
    safetensors makes its own readable for their owner alone."""
    mode = 0o666 & ~current_umask()
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        flush(path)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@cache
def _warn_once(message: str, *arguments: object) -> None:
    log.warning(message, *arguments)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(partial: Path, folder: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    files = {name: entry for part in entries for name, entry in part.items()}
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    flush_tree(partial)
    if folder.exists():
        discard_folder(folder)
    os.rename(partial, folder)
    flush(folder.parent)


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by name."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        return {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def _check(folder: Path, name: str, size: int, digest: str) -> None:
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{name} is missing")
    if file.stat().st_size != size:
        raise ValueError(f"{name} has {file.stat().st_size} bytes, but {size} were written")
    if _digest(file) != digest:
        raise ValueError(f"{name} is not what was written: its hash differs")


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _entry(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(f"{file.name} of another process is not there; choose an output_dir that all hosts see")
    return {"size": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
