"""Folders that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` of what `fill` writes into the path that it is given, with a manifest of sizes and hashes.

    Everything is flushed to the disk in a hidden folder beside it, which is then renamed; a folder of that name is
    replaced. Raises OSError, leaving nothing behind, where the disk is full or a file cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        _write_manifest(partial)
        flush_tree(partial)
        if folder.exists():
            discard_folder(folder)
        os.rename(partial, folder)
        flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"{str(folder)!r} cannot be written: {error}") from error
        raise


def check_folder(folder: Path, needs: Callable[[str], bool] = lambda name: True) -> None:
    """Raises ValueError, naming the file, where one that the manifest lists is missing or is not as it was written.

    Only the files, by their relative names, that `needs` asks for are looked at.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    for name, (size, digest) in files.items():
        if not needs(name):
            continue
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes where {size} were written")
        if _digest(file) != digest:
            raise ValueError(f"{name} is not what was written: its hash differs")


def discard_folder(folder: Path) -> None:
    """Deletes it; under its own name it is gone at once, so that nobody meets half of it."""
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


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


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _digest(file)} for file in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
