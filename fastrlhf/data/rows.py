"""Reads the rows of a dataset from the hub, from files and from folders; every row comes with its place, for error
messages.

`datasets` reads hub datasets, folders written by `save_to_disk`, and Parquet, and finds the splits of a folder. JSON
and CSV files are read here line by line, so that messages can name the line, a bad value affects only its row, and
"007" stays text.

`datasets` and `pyarrow` are imported by the functions that need them, because their import takes a second, and runs on
JSON or CSV files need neither.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastrlhf.data.hub import check_hub

log = logging.getLogger(__name__)

PACKED = (".gz", ".zst")
KINDS = (".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (*(kind + packed for kind in KINDS for packed in ("", *PACKED)), ".parquet")
"""Endings of the files that can be read. Upper and lower case are equivalent in names of files."""

ENDINGS = ".jsonl, .ndjson, .json, .csv (alone or with .gz or .zst) or .parquet"

OTHER_DATA = (".arrow", ".txt", ".tsv", ".xml", ".orc", ".avro", ".zip", ".tar", ".bz2", ".xz", ".lz4", ".7z")
"""Endings of data files that cannot be read. Files with other endings, such as README.md, are not data files."""


class UnusableRow(Exception):
    """Raised for a row that cannot become an example. `reason` is the name under which such rows are counted; `detail`
    describes this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


IN_MEMORY = "rows in memory"
"""The name that messages use for a dataset given as rows in memory."""


def read_rows(
    source: str | Iterable[str] | Iterable[Mapping[str, Any]], split: str, config_name: str | None
) -> Iterator[tuple[str, object]]:
    """Yields (place, row) for the rows of a split, or for rows in memory, in order. Several names are read one after
    the other as one dataset. `split` may be a slice such as train[:500], train[10%:] or train+test, whose numbers count
    over all names.

    Raises ValueError for a source that is missing, damaged or not UTF-8, and for a mapping of splits or columns in
    place of rows."""
    names = source_names(source)
    if not names:
        if isinstance(source, Mapping):
            keys = ", ".join(map(str, source))
            raise ValueError(f"{IN_MEMORY}: give rows, not a {type(source).__name__} of {keys}")
        for number, row in enumerate(source):
            yield f"item {number} of the rows given", dict(row) if isinstance(row, Mapping) else row
        return
    if not set("[+") & set(split) or (len(names) == 1 and not is_local(names[0])):  # `datasets` slices
        for name in names:
            yield from _split_rows(name, split, config_name)
        return
    import datasets

    try:
        instruction = datasets.ReadInstruction.from_spec(split)
    except ValueError:
        form = "a slice looks like train[:500], train[10%:] or train[:500]+test"
        raise ValueError(f"split {split!r} cannot be understood: {form}") from None
    splits = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    rows = {each: [row for name in names for row in _split_rows(name, each, config_name)] for each in splits}
    try:
        parts = instruction.to_absolute({each: len(rows[each]) for each in splits})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"split {split!r}: {shorten(str(error))}") from None
    for part in parts:
        yield from rows[part.splitname][part.from_ : part.to]


def source_names(source: object) -> tuple[str, ...]:
    """Returns the names of files, folders or hub datasets in a source; empty for rows in memory."""
    if isinstance(source, str):
        return (source,)
    values: tuple[Any, ...] = tuple(source) if isinstance(source, (list, tuple)) else ()
    return values if all(isinstance(value, str) for value in values) else ()


def is_local(name: str) -> bool:
    """Returns whether a name is an existing file or folder, or looks like a path. Other names are hub names."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "~")) or name.count("/") > 1 or name.lower().endswith(SUFFIXES)
    return path.is_absolute() or looks_local or path.exists()


def source_fingerprint(
    source: str | Iterable[str], split: str, config_name: str | None, warn: Callable[[str], None]
) -> str:
    """Returns a text that changes with the content of the files from which `read_rows` would read, without reading
    their rows. `warn` is called with the warnings that `read_rows` would log. Raises ValueError as `read_rows` does for
    a source that is missing."""
    names, found = source_names(source), list[str]()
    sliced = set("[+") & set(split) and not (len(names) == 1 and not is_local(names[0]))
    splits = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")) if sliced else [split]
    for each in splits:
        for name in names:
            path = Path(name).expanduser()
            if not is_local(name):
                found.append(f"{name} {each} {_hub_dataset(name, each, config_name)._fingerprint}")
                continue
            parts = _split_parts(name, each, config_name, warn)
            saved = not all(isinstance(part, Path) for part in parts)
            files = [file for file in sorted(path.rglob("*")) if file.is_file()] if saved else parts
            found += [f"{file} {file_fingerprint(file)}" for file in files]
    return "\n".join(found)


def file_fingerprint(path: Path) -> str:
    """Returns the SHA-256 of the content of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _split_rows(name: str, split: str, config_name: str | None) -> Iterator[tuple[str, object]]:
    if not is_local(name):
        for index, row in enumerate(_hub_dataset(name, split, config_name)):
            yield f"{name} row {index}", row
        return
    for part in _split_parts(name, split, config_name, log.warning):
        if isinstance(part, Path):
            yield from _file_rows(part)
        else:
            yield from ((f"{Path(name).expanduser().name} row {index}", row) for index, row in enumerate(part))


def _split_parts(name: str, split: str, config_name: str | None, warn: Callable[[str], None]) -> list[Any]:
    """Returns the files of a split, or the datasets of a folder written by `save_to_disk`."""
    path = Path(name).expanduser()
    if path.is_dir():
        splits = _saved_splits(path) or _folder_splits(path, config_name, warn)
    elif path.is_file():
        splits = {"train": [path]}
    else:
        raise ValueError(f"{name}: no such file or folder (the name of a hub dataset looks like owner/name)")
    if split not in splits:
        raise ValueError(
            f"{name}: no split {split!r} among {sorted(splits)} (a single file is the split 'train'); name one of "
            "them in dataset_train_split or dataset_test_split; if dataset_test_split is empty, rows of the training "
            "split are held out"
        )
    return splits[split]


def _saved_splits(folder: Path) -> dict[str, list[Any]]:
    """Returns split -> datasets of a folder written by `save_to_disk`; a dataset without splits is "train". Empty for
    other folders."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        if inside := [file.parent.name for file in sorted(folder.glob("*/state.json")) if _is_saved(file.parent)]:
            raise ValueError(f"{folder}: save_to_disk wrote the folders inside it; name one: {', '.join(inside)}")
        return {}
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:
        told = "it has no rows" if isinstance(error, IndexError) else shorten(str(error))
        raise ValueError(f"{folder}: not a readable folder of save_to_disk: {told}") from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return {str(split): [dataset] for split, dataset in splits.items()}


def _is_saved(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def _folder_splits(folder: Path, config_name: str | None, warn: Callable[[str], None]) -> dict[str, list[Path]]:
    """Returns split -> files of a folder, by the naming rules of `datasets` (train.jsonl, test-00000-of-00002.parquet,
    ...) or by the configurations in README.md. Calls `warn` with a message about data files that belong to no split or
    cannot be read."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    with tempfile.TemporaryDirectory() as cache:
        # `datasets` reads brackets in a folder name as a pattern, so it gets a symbolic link with a plain name.
        link = Path(cache) / "folder"
        by_card = bool(config_name) or "configs:" in _card(folder)
        originals = {} if by_card else _link_in_lower_case(folder, link)
        if not originals:
            link.symlink_to(folder.resolve(), target_is_directory=True)
        try:
            if by_card:
                found = datasets.load_dataset_builder(str(link), config_name, cache_dir=cache).config.data_files or {}
            else:  # not a builder, which would ignore files with other endings
                found = DataFilesDict.from_patterns(get_data_patterns(str(link)), base_path=str(link))
        except (OSError, ValueError) as error:
            told = shorten(str(error).replace(str(link), str(folder)))
            raise ValueError(f"{folder}: not a folder of data files (or config_name is wrong): {told}") from None
        files = {
            str(split): [
                originals.get(str(file)) or folder / Path(file).relative_to(link) for file in dict.fromkeys(files)
            ]
            for split, files in found.items()
        }
    splits = {
        split: readable
        for split, own in files.items()
        if (readable := [file for file in own if file.name.lower().endswith(SUFFIXES)])
    }
    if not splits:
        raise ValueError(f"{folder}: no file that ends in one of {', '.join(SUFFIXES)}")
    left_out = [] if by_card else _left_out(folder, {file for own in splits.values() for file in own})
    if left_out:
        more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
        warn(
            f"{folder}: files that are not read: {', '.join(left_out[:5])}{more}; the others form the splits "
            f"{', '.join(splits)}. A file belongs to a split if its name contains the split's name and ends in one of "
            f"{ENDINGS}"
        )
    return splits


def _link_in_lower_case(folder: Path, link: Path) -> dict[str, Path]:
    """Makes `link` a folder of links to the files of `folder`, all with names in lower case, because `datasets` finds
    no split in Test.jsonl. Returns link -> file. If no name has capitals, or two names differ only in capitals, nothing
    is made, and the result is empty."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.lower().endswith(SUFFIXES)]
    originals = {str(link / str(path.relative_to(folder)).lower()): path for path in files}
    if len(originals) < len(files) or all(str(link / path.relative_to(folder)) in originals for path in files):
        return {}
    for place, path in originals.items():
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).symlink_to(path.resolve())
    return originals


def _card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text("utf-8", "replace") if card.is_file() else ""


def _left_out(folder: Path, read: set[Path]) -> list[str]:
    """Returns the paths, within the folder, of data files that are not among the files in `read`; hidden files are
    ignored."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path not in read and path.is_file())
    return [
        str(path)
        for path in paths
        if path.name.lower().endswith((*SUFFIXES, *OTHER_DATA))
        and not any(part.startswith((".", "__")) for part in path.parts)
    ]


def _hub_dataset(name: str, split: str, config_name: str | None) -> Any:
    check_hub(name, f"{name}:")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{name}: not a local file or folder, and the hub gave no split {split!r} of it: {shorten(str(error))} "
            "(check the name, the split and config_name, and that the hub can be reached: HF_HUB_OFFLINE)"
        ) from None


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".csv":
        return _csv_rows(path)
    if kind in (".json", ".jsonl", ".ndjson"):
        return _json_rows(path)
    if kind.endswith(".py"):
        raise ValueError(f"{path}: dataset scripts are not run; save their rows, for example with Dataset.to_parquet")
    raise ValueError(f"{path}: a data file ends in one of {', '.join(SUFFIXES)}")


def _kind(path: Path) -> str:
    """Returns the ending of a file name in lower case, without the ending of the compression."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _open(path: Path) -> Any:
    packed = path.suffix.lower()
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), "zstd"))
    return path.open("rb")


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        # Streaming writes no Arrow cache, so that changed content at the same path is read again.
        dataset = datasets.load_dataset("parquet", data_files=[glob.escape(str(path))], split="train", streaming=True)
        for index, row in enumerate(dataset):
            yield f"{path.name} row {index}", row
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {shorten(str(error))}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text with its line end) for a file; a byte-order mark is dropped."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read, or is truncated: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the rows of a JSON file: one object per line, or, in a file named .json, one array of objects, which may
    be the only value of an object."""
    lines = _lines(path)
    if _kind(path) == ".json":
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
    """Returns the rows of text in the form `[...]` or `{"data": [...]}`; None for text in another form."""
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
    return None if {"role", "from"} & set(rows[0]) else rows  # the array is a list of turns, so the object is one row


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path} line {line + error.lineno - 1}, column {error.colno}"
        near = error.doc[max(0, error.pos - 40) : error.pos + 40]
        raise ValueError(f"{place}: broken JSON, {error.msg} near {near!r}; expected one object per line") from None
    except (ValueError, RecursionError) as error:  # for example a number with thousands of digits, or very deep nesting
        raise ValueError(f"{path} line {line}: broken JSON, {error}") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the rows of a CSV file. The first line has the names of the columns, and every cell is text."""
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
    """Shortens a text to one line of at most `width` characters, followed by ... if it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}..."
