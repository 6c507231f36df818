"""Writes files and folders so that they are either complete or absent, even if the process or the machine stops.

Several processes may fill a folder together, on a file system that all of them share. Each computes its share of the
hashes, so every rank must call the functions whose docstrings say so.
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
PASSES = ".passes"
"""Folder in the folder of an unfinished run, with the results of passes over the data before the first step. The name
is hidden, so that the same command can start again after a kill before the first step."""
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
"""Error numbers of file systems that cannot flush a folder."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` from the files that `fill(path)` writes to a temporary folder `path`, and adds a manifest of sizes
    and hashes.

    The temporary folder is flushed to the disk and then renamed to `folder`, replacing an existing one. Raises OSError
    (DiskFull if the disk is full) and leaves nothing behind if a file cannot be written. Every rank must call it and
    calls `fill`, which must fail on all ranks or on none.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        on_first(lambda: _make_empty(partial))
        fill(partial)
        # On a network file system, a rank may not see the files of other ranks immediately.
        names = sorted({name for seen in on_each(lambda: _names(partial)) for name in seen})
        entries = on_each(lambda: {name: _entry(partial / name) for name in share(names)})
        on_first(lambda: _publish(partial, folder, entries))
    except BaseException as error:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise (DiskFull if is_full(error) else OSError)(f"{str(folder)!r} cannot be written: {error}") from error
        raise


def write_own_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Like `write_folder`, but by this process only and without flushing: `check_own_folder` finds files that a power
    failure has damaged. If another process has made the folder in the meantime, its folder stays."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        _make_empty(partial)
        fill(partial)
        entries = {name: _entry(partial / name) for name in _names(partial)}
        (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    """Writes the files of a new folder, given as name -> text. All files are flushed under hidden names before the
    first is renamed, so the last file in `texts` exists only if the folder is complete. `sweep_files` deletes the
    remains after the process was killed."""
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
    """Deletes the remains of a `write_files` during which the process was killed. If the last file still has its hidden
    name, the others are incomplete and are deleted too."""
    *others, mark = names
    if (folder / f".{mark}.partial").exists():
        for name in others:
            (folder / name).unlink(missing_ok=True)
    for name in (*others, mark):
        (folder / f".{name}.partial").unlink(missing_ok=True)


def check_writable(path: str, key: str) -> None:
    """Raises ValueError, naming `key`, if the folder cannot be created or written to. The check leaves no files
    behind."""
    try:
        place = Path(path)
        while not place.exists():
            if place.is_symlink():
                raise ValueError(f"{key}: {path!r} cannot be made: {str(place)!r} is a broken link")
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{key}: {path!r} cannot be made: {str(place)!r} is a file")
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{key}: {path!r} cannot be written to: {error.strerror}") from error


def check_folder(folder: Path, needs: Callable[[str], bool] = lambda name: True) -> None:
    """Raises ValueError, naming the file, if a file in the manifest is missing or has changed since it was written.
    Only files for whose relative names `needs` returns True are checked. Every rank must call it.
    """
    files = on_first(lambda: {name: entry for name, entry in _read_manifest(folder).items() if needs(name)})
    on_each(lambda: [_check(folder, name, *files[name]) for name in share(list(files))])


def check_own_folder(folder: Path) -> None:
    """Like `check_folder`, but in this process only and for all files."""
    for name, entry in _read_manifest(folder).items():
        _check(folder, name, *entry)


def discard_folder(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a partly deleted folder never has the original name."""
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def sweep(folder: Path, names: str) -> None:
    """Deletes partly written and partly deleted folders that a killed process has left in `folder`, if their names
    match the glob pattern `names`."""
    for what in ("partial", "discarded"):
        for path in folder.glob(f".{names}.{what}"):
            shutil.rmtree(path)


def flush(path: Path) -> None:
    """Flushes the content of a file, or the list of names in a folder, to the disk. Some file systems cannot flush
    folders; then a warning is logged, once, that a power failure may lose recent files."""
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
    """Flushes every file and folder below `folder`, and sets the permissions of the files by the umask, because
    safetensors makes its files readable only for their owner."""
    mode = 0o666 & ~current_umask()
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        flush(path)


def current_umask() -> int:
    """Returns the umask of the process, which can only be read by setting it."""
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
    """Returns size and SHA-256 of every file in the manifest by name."""
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
        raise ValueError(f"{name} has changed since it was written: its hash differs")


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _entry(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(f"{file.name}, written by another process, is missing; choose an output_dir that all hosts share")
    return {"size": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
