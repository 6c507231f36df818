"""Rows passed in by a program, in place of the configured dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastrlhf.config import TrainConfig, parse_columns, require
from fastrlhf.data.examples import LoadedExamples, load_examples
from fastrlhf.data.rows import source_names
from fastrlhf.types import Example

log = logging.getLogger(__name__)

Rows = LoadedExamples | Iterable[Example] | Iterable[Mapping[str, Any]]
"""Rows that trainers accept in place of the configured dataset: the result of `load_examples`, examples, or rows in a
form that files may have, for example a datasets.Dataset."""


def given_examples(config: TrainConfig, fields: Sequence[str], rows: Rows | None, name: str) -> list[Example]:
    """The rows that a trainer was given, as examples with a row number each. Rows that are mappings are understood like
    those of a file, under `columns` and `max_bad_fraction`.

    Raises ValueError for a name, for rows of both kinds, and as `load_examples` does.
    """
    if rows is None:
        return []
    if isinstance(rows, LoadedExamples):
        return rows.examples
    require(not source_names(rows), f"{name} rows", rows, "rows; the name of a dataset goes into dataset_name")
    given: Any = rows
    values = [given] if isinstance(given, Mapping) else list(given)
    kinds = {type(value) for value in values}
    if Example in kinds:
        others = ", ".join(sorted(kind.__name__ for kind in kinds - {Example}))
        require(not others, f"{name} rows", others, "all objects of Example, or all mappings")
        return [row if row.row >= 0 else replace(row, row=i) for i, row in enumerate(values)]
    if not values:
        return []
    loaded = load_examples(
        given if isinstance(given, Mapping) else values,
        columns=parse_columns(config.columns),
        needs=("prompt", *fields),
        max_bad_fraction=config.max_bad_fraction,
    )
    log.info("%s: %s", name, loaded.summary())
    return loaded.examples
