"""Lists the entries of the token store, or deletes them.

`fastrlhf cache [--dataset_cache_dir FOLDER] [--clear all] [--clear KEY ...]`
"""

from __future__ import annotations

from datetime import datetime

from fastrlhf.config import CacheConfig, require
from fastrlhf.runtime.token_store import Entry, entries, remove, store_folder


def list_or_clear(config: CacheConfig) -> str:
    """Deletes the entries that `config.clear` names, and returns a list of the others for a terminal. Raises
    ValueError, before anything is deleted, for a key that fits no entry or several entries."""
    folder = store_folder(config.dataset_cache_dir)
    found = entries(folder)
    deleted = _named(found, config.clear)
    remove(folder, [entry.key for entry in deleted])
    left = [entry for entry in found if entry not in deleted]
    lines = [f"deleted {entry.key[:12]}: {_size(entry)}, {entry.told}" for entry in deleted]
    lines += [
        f"{entry.key[:12]}  {datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}  {_size(entry)}, "
        f"{entry.num_rows:,} rows, {entry.num_tokens:,} tokens: {entry.told}"
        for entry in left
    ]
    total = sum(entry.num_bytes for entry in left)
    return "\n".join([*lines, f"{folder}: {len(left)} entries, {total / 2**20:,.1f} MiB"])


def _named(found: list[Entry], names: tuple[str, ...]) -> list[Entry]:
    if names == ("all",):
        return found
    named = []
    for name in names:
        fitting = [entry for entry in found if entry.key.startswith(name)]
        rule = "all, or the first letters of the key of one entry"
        require(bool(name) and len(fitting) == 1, "clear", name, f"{rule}; it fits {len(fitting)} entries")
        named += [entry for entry in fitting if entry not in named]
    return named


def _size(entry: Entry) -> str:
    return f"{entry.num_bytes / 2**20:,.1f} MiB"
