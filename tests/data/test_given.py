"""Tests of rows that a Python program passes to a trainer in place of a configured dataset."""

import logging
from dataclasses import replace

import datasets
import pytest

from fastrlhf import (
    DPOConfig,
    SFTConfig,
    load_examples,
)
from fastrlhf.data.given import given_examples, with_system_prompt
from fastrlhf.types import Example
from tests import tiny

FIELDS = {"per_device_train_batch_size": 4, "max_steps": 1, "progress": False, "device": "cpu"}
EXAMPLES = tiny.examples(6)
ROWS = [{"prompt": example.prompt, "completion": example.reference, "other": 1} for example in EXAMPLES]
PAIRS = [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in EXAMPLES]


@pytest.mark.parametrize(
    "rows",
    [
        [replace(example, row=-1) for example in EXAMPLES],
        (replace(example, row=-1) for example in EXAMPLES),
        ROWS,
        iter(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        load_examples(ROWS, needs=["reference"]),
    ],
    ids=["examples", "generator", "mappings", "iterator", "dataset", "iterable dataset", "loaded"],
)
def test_rows_in_any_form_are_the_same_examples(rows):
    found = given_examples(SFTConfig(), ["reference"], rows, "train")
    assert [(e.prompt, e.reference, e.row) for e in found] == [(e.prompt, e.reference, e.row) for e in EXAMPLES]


def test_columns_and_bad_rows_count_as_in_a_file(caplog):
    rows = [{"question": "w1", "better": "w2", "worse": "w3"}] * 3 + [{"question": "w1", "better": "w2", "worse": ""}]
    config = DPOConfig(columns="prompt=question,chosen=better,rejected=worse", max_bad_fraction=0.5)
    with caplog.at_level(logging.INFO, logger="fastrlhf"):
        found = given_examples(config, ["chosen", "rejected"], rows, "train")
    assert [example.row for example in found] == [0, 1, 2]
    assert "train: rows in memory: 3 examples of 4 rows" in caplog.text
    with pytest.raises(ValueError, match=r"^rows in memory: 1 of 4 rows cannot be used"):
        given_examples(replace(config, max_bad_fraction=0.1), ["chosen", "rejected"], rows, "train")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("rows.jsonl", "^train rows: must be rows; the name of a dataset goes into dataset_name; got 'rows.jsonl'$"),
        ([EXAMPLES[0], ROWS[0]], "^train rows: must be all objects of Example, or all mappings; got 'dict'$"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "give rows, not a DatasetDict of train$"),
        ([{"text_a": "w1"}], "rows in memory: "),
    ],
)
def test_a_value_that_is_not_a_list_of_rows_is_refused(rows, told):
    with pytest.raises(ValueError, match=told):
        given_examples(SFTConfig(), ["reference"], rows, "train")


def test_rows_that_are_neither_examples_nor_mappings_are_refused_with_their_form():
    with pytest.raises(ValueError, match=r"^train rows: must be objects of Example, or mappings such as .* got int$"):
        given_examples(SFTConfig(), ["reference"], [3], "train")


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("kind", [list, iter, load_examples])
def test_a_system_prompt_makes_conversations_of_rows_of_text(kind):
    rows = [{"prompt": "w1", "chosen": "w2", "rejected": " w3"}, {"prompt": "w4", "chosen": "w5", "rejected": "w6"}]
    found = given_examples(DPOConfig(system_prompt="w9"), ["chosen", "rejected"], kind(rows), "train")
    assert [(e.prompt, e.chosen, e.rejected) for e in found] == [
        ([*turn("system", "w9"), *turn("user", "w1")], turn("assistant", "w2"), turn("assistant", " w3")),
        ([*turn("system", "w9"), *turn("user", "w4")], turn("assistant", "w5"), turn("assistant", "w6")),
    ]


def test_a_system_turn_of_the_row_takes_precedence():
    rows = [
        {"prompt": turn("user", "w1"), "system": "w2"},
        {"prompt": turn("user", "w1"), "system": None},
        {"prompt": [*turn("system", "w3"), *turn("user", "w1")], "system": ""},
    ]
    found = given_examples(SFTConfig(system_prompt="w9"), [], rows, "train")
    assert [e.prompt for e in found] == [[*turn("system", text), *turn("user", "w1")] for text in ("w2", "w9", "w3")]


def test_groups_get_turns_and_rows_without_a_prompt_are_refused():
    example = with_system_prompt(Example(prompt="w1", responses=["w2", "w3"], row=0), "w9")
    assert example.responses == [turn("assistant", "w2"), turn("assistant", "w3")]
    with pytest.raises(ValueError, match=r"^system_prompt: must be empty for rows without a prompt, such as row 4"):
        with_system_prompt(Example(prompt="", reference="w2", row=4), "w9")
    assert with_system_prompt(example, "") is example
