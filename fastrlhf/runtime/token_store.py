"""Keeps tokenised rows on disk, so that a later start and other processes map them in place of tokenising again.

    FOLDER/KEY/
        tokens.npy, starts.npy, ...   the arrays of a Block (data/token_set.py), which are memory-mapped
        part.json                     labels, report, and what a run prints about the rows
        manifest.json                 size and hash of every file

KEY is a hash of everything that the rows depend on. An entry is written to a temporary folder, which is then renamed,
so that no process sees half an entry.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from fastrlhf.data.examples import Origin
from fastrlhf.data.fingerprints import rows_fingerprint
from fastrlhf.data.token_report import TokenReport
from fastrlhf.data.token_set import ARRAYS, Block, TokenSet
from fastrlhf.runtime.atomic import check_own_folder, write_own_folder

log = logging.getLogger(__name__)

PART = "part.json"
STALE = 24 * 3600.0
"""Age in seconds at which the remains of an interrupted write are deleted."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokenised rows of a dataset, and what a run prints about them."""

    rows: TokenSet
    report: TokenReport
    loaded: str = ""
    """One line about how the rows were read; empty for rows that a program passed."""
    origin: Origin = field(default_factory=Origin)
    conversations: bool = False
    """Whether any row is a conversation."""
    earlier_turns: int = 0
    """Number of turns of the assistant in the prompts of conversations."""
    num_read: int = 0
    """Number of rows that were read, including unusable ones."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a store."""

    key: str
    told: str
    """The dataset, its part and the tokenizer, or "interrupted write"."""
    num_rows: int
    num_tokens: int
    num_bytes: int
    used: float
    """Time of the last use, in seconds since 1970."""


def store_folder(dataset_cache_dir: str) -> Path:
    """Returns the folder of the token store: `dataset_cache_dir`, or a folder beside the caches of the hub."""
    return Path(dataset_cache_dir or Path(constants.HF_HOME) / "fastrlhf" / "tokens").expanduser()


def read_part(folder: Path, key: str) -> Part | None:
    """Returns the rows of an entry, mapped from its files; None if there is none. A damaged entry is deleted, with a
    warning."""
    entry = folder / key
    if not entry.is_dir():
        return None
    try:
        check_own_folder(entry)
        part = _read(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("dataset_cache_dir: %s is damaged, so the rows are tokenised again: %s", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):  # the store may belong to another user
        os.utime(entry)  # the time of the last use
    return part


def write_part(folder: Path, key: str, part: Part, told: str) -> Part:
    """Writes rows to the store and returns the same rows, mapped from the files. `told` describes the entry to users.
    If the entry cannot be written, a warning is logged and the rows stay in memory."""
    known = TokenSet([_block(part)], fingerprint=rows_fingerprint(part.rows))
    part = replace(part, rows=known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        write_own_folder(folder / key, lambda place: _fill(place, part, told))
        return read_part(folder, key) or part
    except (OSError, TypeError, ValueError) as error:  # TypeError: a label that JSON cannot hold
        log.warning("dataset_cache_dir: %s cannot be written, so the next start tokenises again: %s", folder, error)
        return part


def entries(folder: Path) -> list[Entry]:
    """Returns the entries of a store, the last used first."""
    found = [_entry(path) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda entry: -entry.used)


def remove(folder: Path, keys: Sequence[str]) -> None:
    """Deletes entries. Runs that have mapped them keep their rows."""
    for key in keys:
        hidden = folder / f".{key.lstrip('.')}.{os.getpid()}.partial"
        os.rename(folder / key, hidden)
        shutil.rmtree(hidden)


def _block(part: Part) -> Block:
    (block,) = part.rows.blocks
    return block


def _fill(place: Path, part: Part, told: str) -> None:
    block = _block(part)
    for name in ARRAYS:
        np.save(place / f"{name}.npy", getattr(block, name))
    facts = {
        "told": told,
        "num_rows": len(block),
        "num_tokens": len(block.tokens),
        "fingerprint": part.rows.known_fingerprint,
        "labels": block.labels,
        "report": asdict(part.report),
        "loaded": part.loaded,
        "origin": asdict(part.origin) | {"read": sorted(part.origin.read)},
        "conversations": part.conversations,
        "earlier_turns": part.earlier_turns,
        "num_read": part.num_read,
    }
    (place / PART).write_text(json.dumps(facts), encoding="utf-8", errors="surrogatepass")


def _read(entry: Path) -> Part:
    facts = _facts(entry)
    arrays: dict[str, Any] = {name: _mapped(entry / f"{name}.npy") for name in ARRAYS}
    block = Block(**arrays, labels=facts["labels"])
    origin = facts["origin"]
    return Part(
        rows=TokenSet([block], fingerprint=facts["fingerprint"]),
        report=TokenReport(**facts["report"] | {"ends": tuple(facts["report"]["ends"])}),
        loaded=facts["loaded"],
        origin=Origin(sources=tuple(origin["sources"]), lines=origin["lines"], read=frozenset(origin["read"])),
        conversations=facts["conversations"],
        earlier_turns=facts["earlier_turns"],
        num_read=facts["num_read"],
    )


def _mapped(file: Path) -> np.ndarray:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # a plain view of the map, whose items are read faster


def _facts(entry: Path) -> Mapping[str, Any]:
    return json.loads((entry / PART).read_text("utf-8", "surrogatepass"))


def _entry(path: Path) -> Entry:
    size, used = sum(file.stat().st_size for file in path.iterdir()), path.stat().st_mtime
    told, num_rows, num_tokens = "interrupted write", 0, 0
    if not path.name.startswith("."):
        try:
            facts = _facts(path)
            told, num_rows, num_tokens = facts["told"], facts["num_rows"], facts["num_tokens"]
        except (OSError, ValueError, KeyError):
            told = "damaged"
    return Entry(key=path.name, told=told, num_rows=num_rows, num_tokens=num_tokens, num_bytes=size, used=used)


def _sweep(folder: Path) -> None:
    """Deletes the remains of writes that were interrupted long ago."""
    for path in folder.glob(".*.partial"):
        if time.time() - path.stat().st_mtime > STALE:
            shutil.rmtree(path, ignore_errors=True)
