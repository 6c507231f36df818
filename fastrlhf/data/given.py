"""Converts rows that a program passes to a trainer in place of the configured dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastrlhf.config import TrainConfig, parse_columns, require
from fastrlhf.data.examples import LoadedExamples, load_examples
from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.rows import source_names
from fastrlhf.types import Example, Text

log = logging.getLogger(__name__)

Rows = LoadedExamples | Iterable[Example] | Iterable[Mapping[str, Any]]
"""Rows that trainers accept in place of the configured dataset: the result of `load_examples`, Example objects, or
mappings in any form that a file may have, for example a datasets.Dataset."""


def given_examples(config: TrainConfig, fields: Sequence[str], rows: Rows | None, name: str) -> list[Example]:
    """Converts the rows passed to a trainer to examples with row numbers and the turn of `system_prompt`. Rows that are
    mappings are read like the rows of a file, with the keys `columns` and `max_bad_fraction`.

    Raises ValueError if the rows are the name of a dataset or a mixture of Examples and mappings, and as
    `load_examples` does.
    """
    examples = _examples(config, fields, rows, name)
    return [with_system_prompt(example, config.system_prompt) for example in examples]


def with_system_prompt(example: Example, text: str) -> Example:
    """Puts a system turn with this text before the prompt of an example, unless the prompt begins with a system turn or
    the text is empty. A text prompt becomes a turn of the user, and text responses become turns of the assistant.
    Raises ValueError, naming the row, for a row without a prompt."""
    if not text:
        return example
    prompt = example.prompt
    require(bool(prompt), "system_prompt", text, f"empty for rows without a prompt, such as row {example.row}")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns[0]["role"] not in ("system", "developer"):
        turns = [{"role": "system", "content": text}, *turns]

    def answer(response: Text) -> Text:
        return [{"role": "assistant", "content": response}] if isinstance(response, str) else response

    given = {name: getattr(example, name) for name in RESPONSES}
    answers = {name: answer(response) for name, response in given.items() if response is not None}
    group = None if example.responses is None else [answer(response) for response in example.responses]
    return replace(example, prompt=turns, responses=group, **answers)


def _examples(config: TrainConfig, fields: Sequence[str], rows: Rows | None, name: str) -> list[Example]:
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
