"""Folders that are there whole or not at all, whenever a process or the machine stops.

Of several processes every one makes the calls that say so: together they fill a folder that all of them see, and each
computes its share of the hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastrlhf.distributed.ranks import is_first, on_each, on_first, share

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` of what `fill` writes into the path that it is given, with a manifest of sizes and hashes.

    Everything is flushed to the disk in a hidden folder beside it, which is then renamed; a folder of that name is
    replaced. Raises OSError, leaving nothing behind, where the disk is full or a file cannot be written. Every rank
    must ask, and calls `fill`, which fails on all of them or on none.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        on_first(lambda: _make_empty(partial))
        fill(partial)
        # Of a file system in a network, a rank is sure to see its own files at once.
        names = sorted({name for seen in on_each(lambda: _names(partial)) for name in seen})
        entries = on_each(lambda: {name: _entry(partial / name) for name in share(names)})
        on_first(lambda: _publish(partial, folder, entries))
    except BaseException as error:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"{str(folder)!r} cannot be written: {error}") from error
        raise


def write_file(path: Path, text: str) -> None:
    """Makes a file, and the folders that lead to it; one of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def check_folder(folder: Path, needs: Callable[[str], bool] = lambda name: True) -> None:
    """Raises ValueError, naming the file, where one that the manifest lists is missing or is not as it was written.

    Only the files, by their relative names, that `needs` asks for are looked at. Every rank must ask.
    """
    files = on_first(lambda: {name: entry for name, entry in _read_manifest(folder).items() if needs(name)})
    on_each(lambda: [_check(folder, name, *files[name]) for name in share(list(files))])


def discard_folder(folder: Path) -> None:
    """Deletes it; under its own name it is gone at once, so that nobody meets half of it."""
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def sweep(folder: Path, names: str) -> None:
    """Deletes what a process that was killed has left half written or half deleted, of the folders in `folder` whose
    names match `names`, a pattern as of glob."""
    for what in ("partial", "discarded"):
        for path in folder.glob(f".{names}.{what}"):
            shutil.rmtree(path)


def flush(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


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
        raise ValueError(f"{name} has {file.stat().st_size} bytes where {size} were written")
    if _digest(file) != digest:
        raise ValueError(f"{name} is not what was written: its hash differs")


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _entry(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(f"{file.name} of another process is not there; take a folder that all hosts see")
    return {"size": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
