"""Rows of a dataset, each with a place for messages: the hub, local files and folders.

The hub, the splits of a folder and Parquet go through `datasets`. JSON and CSV are read line by line, because a message
must name the line, one odd value must spoil one row and not the file, and "007" must stay text.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from fastrlhf.data.hub import check_hub

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
"""Suffixes of data files, compared with names in lower case."""


class UnusableRow(Exception):
    """A row that gives no example. `reason` is the name under which it is counted; `detail` describes this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


IN_MEMORY = "rows in memory"
"""Name that messages use for a source in memory."""


def read_rows(
    source: str | Iterable[Mapping[str, Any]], split: str, config_name: str | None
) -> Iterator[tuple[str, object]]:
    """(place, row) of a split, or of rows in memory, in order. Raises ValueError for a source that is missing, broken
    or not UTF-8, and for a mapping of splits or columns, which is not an iterable of rows."""
    if not isinstance(source, str):
        if isinstance(source, Mapping):
            names = ", ".join(map(str, source))
            raise ValueError(f"{IN_MEMORY}: give rows, not a {type(source).__name__} of {names}")
        for number, row in enumerate(source):
            yield f"number {number} of those given", dict(row) if isinstance(row, Mapping) else row
        return
    path = Path(source).expanduser()
    if path.is_dir():
        splits = _folder_splits(path, config_name)
    elif path.is_file():
        splits = {"train": [path]}
    elif (
        path.is_absolute()
        or source.startswith((".", "~"))
        or source.count("/") > 1
        or source.lower().endswith(SUFFIXES)
    ):
        raise ValueError(f"{source}: no such file or folder (a hub dataset is named like owner/name)")
    else:
        yield from _hub_rows(source, split, config_name)
        return
    if split not in splits:
        raise ValueError(f"{source}: no split {split!r} among {sorted(splits)} (a single file is the split 'train')")
    for file in splits[split]:
        yield from _file_rows(file)


def _folder_splits(folder: Path, config_name: str | None) -> dict[str, list[Path]]:
    """Split -> files, by the naming rules of `datasets` (train.jsonl, test-00000-of-00002.parquet, ...)."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            found = datasets.load_dataset_builder(str(folder), config_name, cache_dir=cache).config.data_files or {}
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: not a folder of data files (or config_name is wrong): {shorten(str(error))}"
            ) from None
    splits = {
        str(split): [Path(file) for file in files if file.lower().endswith(SUFFIXES)] for split, files in found.items()
    }
    splits = {split: files for split, files in splits.items() if files}
    if not splits:
        raise ValueError(f"{folder}: no file that ends in one of {', '.join(SUFFIXES)}")
    return splits


def _hub_rows(name: str, split: str, config_name: str | None) -> Iterator[tuple[str, object]]:
    check_hub(name, f"{name}:")
    try:
        dataset = datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{name}: no file or folder here, and the hub gave no split {split!r} of it: {shorten(str(error))} "
            "(check the name, the split and config_name, and that the hub can be reached: HF_HUB_OFFLINE)"
        ) from None
    for index, row in enumerate(dataset):
        yield f"{name} row {index}", row


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    kind = path.name.lower().removesuffix(".gz")
    if kind.endswith(".parquet"):
        return _parquet_rows(path)
    if kind.endswith(".csv"):
        return _csv_rows(path)
    if kind.endswith((".json", ".jsonl", ".ndjson")):
        return _json_rows(path)
    raise ValueError(f"{path}: a data file ends in one of {', '.join(SUFFIXES)}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        # streaming writes no Arrow cache, so new content at an old path is never served stale
        dataset = datasets.load_dataset("parquet", data_files=[glob.escape(str(path))], split="train", streaming=True)
        for index, row in enumerate(dataset):
            yield f"{path.name} row {index}", row
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {shorten(str(error))}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end); a byte-order mark is dropped."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read, or cut short: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """One object per line; or, in a file named .json, one array of objects, alone or as the only value of an object."""
    lines = _lines(path)
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        text = "".join(line for _, line in lines)
        rows = _array(text, path)
        if rows is not None:
            for index, row in enumerate(rows):
                yield f"{path.name} item {index}", row
            return
        lines = enumerate(text.split("\n"), start=1)
    for number, line in lines:
        if line.strip():
            yield f"{path.name} line {number}", _parse_json(line.rstrip(), path, number)


def _array(text: str, path: Path) -> list[Any] | None:
    """The rows of `[...]` and of `{"data": [...]}`; None for text in another form."""
    if text.lstrip().startswith("["):
        return _parse_json(text, path, 1)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # one object per line
        return None
    values = list(whole.values()) if isinstance(whole, dict) else []
    rows = values[0] if len(values) == 1 else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    return None if {"role", "from"} & set(rows[0]) else rows  # turns: the whole is one row


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path} line {line + error.lineno - 1}, column {error.colno}"
        near = error.doc[max(0, error.pos - 40) : error.pos + 40]
        raise ValueError(f"{place}: broken JSON, {error.msg} near {near!r}; expected one object per line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ValueError(f"{path} line {line}: broken JSON, {error}") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Every cell is text; the first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # a conversation can be longer than the default of 128 KiB
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise csv.Error(f"{len(cells)} cells under {len(header)} columns; quote cells that hold commas")
            if cells:
                yield f"{path.name} line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: broken CSV: {error}") from None


def shorten(text: str, width: int = 300) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}..."
