"""Converts rows that a program passes to a trainer in place of the configured dataset."""

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
"""Rows that trainers accept in place of the configured dataset: the result of `load_examples`, Example objects, or
mappings in any form that a file may have, for example a datasets.Dataset."""


def given_examples(config: TrainConfig, fields: Sequence[str], rows: Rows | None, name: str) -> list[Example]:
    """Converts the rows passed to a trainer to examples with row numbers. Rows that are mappings are read like the rows
    of a file, with the keys `columns` and `max_bad_fraction`.

    Raises ValueError if the rows are the name of a dataset or a mixture of Examples and mappings, and as
    `load_examples` does.
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
    if others := ", ".join(sorted(kind.__name__ for kind in kinds if not issubclass(kind, Mapping))):
        form = 'objects of Example, or mappings such as {"prompt": ..., "completion": ...}'
        raise ValueError(f"{name} rows: must be {form}; got {others}")
    loaded = load_examples(
        given if isinstance(given, Mapping) else values,
        columns=parse_columns(config.columns),
        needs=("prompt", *fields),
        max_bad_fraction=config.max_bad_fraction,
    )
    log.info("%s: %s", name, loaded.summary())
    return loaded.examples
