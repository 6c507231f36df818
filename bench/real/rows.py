"""Short preference pairs from the samples in the folder FASTRLHF_DATA, as conversations and as text."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FILES = {"chat": "hh_helpful_train.jsonl.gz", "text": "tldr_gpt4judged.jsonl.gz"}
"""Form of the rows -> file. chat: conversations (HH, helpful). text: posts and summaries (TL;DR)."""
LEAST_CHARACTERS = 100
"""Minimum number of characters of a pair. Shorter dialogues are only greetings."""


def read_rows(name: str) -> list[Row]:
    """Returns the rows of a file in FASTRLHF_DATA. Raises RuntimeError if the variable is not set."""
    folder = os.environ.get("FASTRLHF_DATA")
    if not folder:
        raise RuntimeError("FASTRLHF_DATA: set this variable to a folder with the samples of preference data")
    with gzip.open(Path(folder) / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def short_pairs(form: str, count: int) -> list[Row]:
    """Returns the `count` shortest pairs of at least `LEAST_CHARACTERS`, in the order of their length. Their columns
    are prompt, chosen and rejected."""
    rows = sorted(read_rows(FILES[form]), key=num_characters)
    long_enough = [row for row in rows if num_characters(row) >= LEAST_CHARACTERS]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in long_enough[:count]]


def num_characters(row: Row) -> int:
    """Returns the number of characters of prompt and both responses."""

    def size(value: Any) -> int:
        return len(value) if isinstance(value, str) else sum(len(turn["content"]) for turn in value)

    return sum(size(row[name]) for name in ("prompt", "chosen", "rejected"))


def write_rows(rows: Sequence[Row], path: Path) -> str:
    """Writes rows as JSON lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
