"""The entries of `dataset_name` if it lists several datasets with weights, columns or splits."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastrlhf.config.checks import require

COLUMNS = (
    *("prompt", "chosen", "rejected", "reference", "label", "label_prob", "margin"),
    *("responses", "preferences", "scores", "wins", "num_labels"),
)
"""The column names that the key `columns` may map to other names."""

ENTRIES = re.compile(r'\s*(\{|\[\s*[{"\]])')
"""Matches text that is an entry, or a list of entries, rather than the name of a dataset."""


@dataclass(frozen=True)
class Source:
    """One of several datasets of a run."""

    path: str
    """Hub name, file or folder."""
    weight: float = 1.0
    """How often each row is drawn, relative to a row of a source of weight 1."""
    columns: str | None = None
    """Replaces the key `columns` for this source: text of the same form, or a mapping. None: the key."""
    split: str | None = None
    """Split to train on. None: the key `dataset_train_split`."""
    config: str | None = None
    """Name of the configuration of a hub dataset. None: the key `dataset_config`."""

    def __post_init__(self) -> None:
        text = isinstance(self.path, str | os.PathLike) and bool(os.fspath(self.path))
        require(text, "path", self.path, "a hub name, or a local file or folder")
        object.__setattr__(self, "path", os.path.expanduser(os.fspath(self.path)))
        object.__setattr__(self, "weight", _number(self.weight))
        if isinstance(self.columns, Mapping):
            object.__setattr__(self, "columns", ",".join(f"{name}={column}" for name, column in self.columns.items()))
        for name in ("columns", "split", "config"):
            value = getattr(self, name)
            require(value is None or isinstance(value, str), name, value, "text")
        parse_columns(self.columns or "")


def read_sources(value: Any) -> Any:
    """Returns a value of `dataset_name` with its entries as a tuple of `Source`. A name and a list of names, which has
    no entries with keys, are returned unchanged.

    An entry may be a `Source`, a mapping, JSON or YAML text of a mapping, or, beside these, a name. Raises ValueError,
    naming the index of the entry, for an unknown key or a bad value.
    """
    if isinstance(value, str) and ENTRIES.match(value) and not os.path.lexists(value):
        value = _parsed(value)
    if isinstance(value, Source | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    items = [_parsed(item) if isinstance(item, str) and item.lstrip().startswith("{") else item for item in value]
    if not any(isinstance(item, Source | Mapping) for item in items):
        return value
    return tuple(_source(index, item) for index, item in enumerate(items))


def weighted(dataset_name: object) -> tuple[Source, ...]:
    """Returns the entries of `dataset_name`; empty if it is a name or a list of names."""
    values = dataset_name if isinstance(dataset_name, tuple) else ()
    return tuple(value for value in values if isinstance(value, Source))


def dataset_names(dataset_name: Any) -> tuple[str, ...]:
    """Returns the hub names, files and folders in `dataset_name`."""
    if isinstance(dataset_name, str):
        return (dataset_name,)
    return tuple(each.path if isinstance(each, Source) else each for each in dataset_name)


def labels_of(sources: tuple[Source, ...]) -> list[str]:
    """Returns a short name of each source for metrics: the last part of its path without the ending of a file. If it is
    not unique, the index of the entry is appended."""
    short = [Path(source.path).name.split(".")[0] or Path(source.path).name for source in sources]
    labels = [name if short.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(short)]
    return labels if len({*labels}) == len(labels) else [f"{name}_{index}" for index, name in enumerate(short)]


def parse_columns(columns: str) -> dict[str, str]:
    """Parses "prompt=question,chosen=better" to {"prompt": "question", "chosen": "better"}. Raises ValueError for text
    in another form."""
    pairs = [pair.partition("=") for pair in columns.split(",") if pair]
    for name, equals, column in pairs:
        if not equals or not column or name not in COLUMNS:
            raise ValueError(
                f"columns: {columns!r} must look like prompt=question,chosen=better; the names before = are "
                f"{', '.join(COLUMNS)}"
            )
    return {name: column for name, _, column in pairs}


def _source(index: int, item: Any) -> Source:
    place = f"dataset_name[{index}]"
    if isinstance(item, Source):
        return item
    if isinstance(item, str | os.PathLike):
        item = {"path": item}
    known = [field.name for field in fields(Source)]
    require(isinstance(item, Mapping), place, item, f"a name, or a mapping with the keys {', '.join(known)}")
    for key in item:
        if key not in known:
            raise ValueError(f"{place}: unknown key {key!r}; an entry has the keys {', '.join(known)}")
    if not item.get("path"):
        raise ValueError(f"{place}: path is missing; give a hub name, or a local file or folder")
    try:
        return Source(**{key: value for key, value in item.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _number(weight: Any) -> float:
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    require(math.isfinite(number) and number > 0, "weight", weight, "a number above 0")
    return number


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        import yaml  # not in the base install

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            told = " ".join(str(error).split())
            raise ValueError(f"dataset_name: {text!r} is neither JSON nor YAML: {told}") from None
