"""Tests of the labels of rows (scores, win counts, probabilities): how they are read, and which rows are refused."""

import json
import math

import numpy as np
import pytest

from fastrlhf.data.examples import load_examples
from fastrlhf.data.labels import GROUP_LABELS, read_counts, read_group_labels, read_pair_labels
from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example, TokenizedExample
from tests import tiny

MATRIX = [[0.5, 0.9], [0.1, 0.5]]


def load(folder, rows, *needs, **arguments):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(folder / "a.jsonl"), needs=("prompt", *needs), **arguments)


def test_a_group_of_texts_keeps_its_order_and_its_labels(tmp_path):
    rows = [
        {"prompt": "x", "responses": ["a", "b"], "preferences": MATRIX},
        {"prompt": "y", "responses": ["c", "c", "d"], "scores": [1, 2.5, -3]},
        {"prompt": "z", "responses": ["e", "f"], "scores": None},
    ]
    loaded = load(tmp_path, rows, "responses", *GROUP_LABELS)
    assert loaded.form == "groups, text"
    assert loaded.examples == [
        Example(prompt="x", responses=["a", "b"], preferences=MATRIX, row=0),
        Example(prompt="y", responses=["c", "c", "d"], scores=[1.0, 2.5, -3.0], row=1),
        Example(prompt="z", responses=["e", "f"], row=2),
    ]


def test_a_group_of_conversations_and_columns_of_other_names(tmp_path):
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}
    other = {"role": "assistant", "content": "b"}
    rows = [{"question": [user], "answers": [[answer], [user, other]], "rating": [4, 2]}]
    columns = {"prompt": "question", "responses": "answers", "scores": "rating"}
    loaded = load(tmp_path, rows, "responses", *GROUP_LABELS, columns=columns)
    assert loaded.form == "groups, conversational"
    assert loaded.examples == [Example(prompt=[user], responses=[[answer], [other]], scores=[4.0, 2.0], row=0)]


def test_ultrafeedback_is_a_group_of_responses_with_ratings(tmp_path):
    completions = [{"response": "a", "overall_score": 7.5, "model": "x"}, {"response": "b", "overall_score": 4}]
    good = {"source": "s", "instruction": "Q", "completions": completions}
    bad = {"instruction": "Q", "completions": [completions[0], {"response": "b"}]}
    loaded = load(tmp_path, [good, bad], "responses", *GROUP_LABELS, max_bad_fraction=0.5)
    assert loaded.examples == [Example(prompt="Q", responses=["a", "b"], scores=[7.5, 4.0], row=0)]
    assert loaded.skipped == {"wrong_type": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "responses": ["a"]}, "wrong_type"),
        ({"prompt": "x", "responses": "a b"}, "wrong_type"),
        ({"prompt": "x", "responses": ["a", 3]}, "wrong_type"),
        ({"prompt": "x", "responses": ["a", " "]}, "empty_response"),
        ({"prompt": "x"}, "missing_responses"),
        ({"prompt": "", "responses": ["a", "b"]}, "empty_prompt"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1]}, "wrong_type"),
    ],
)
def test_a_row_that_is_not_a_group_is_counted_by_its_reason(tmp_path, row, reason):
    good = {"prompt": "x", "responses": ["a", "b"]}
    assert load(tmp_path, [good, row], "responses", *GROUP_LABELS, max_bad_fraction=0.5).skipped == {reason: 1}


def test_labels_of_a_group_are_only_read_if_needed(tmp_path):
    rows = [{"prompt": "x", "responses": ["a", "b"], "scores": [1]}]
    assert load(tmp_path, rows, "responses").examples == [Example(prompt="x", responses=["a", "b"], row=0)]
    completions = [{"response": "a", "overall_score": None}, {"response": "b"}]
    loaded = load(tmp_path, [{"instruction": "Q", "completions": completions}], "responses")
    assert loaded.examples == [Example(prompt="Q", responses=["a", "b"], row=0)]


def test_groups_are_not_read_if_they_are_not_needed(tmp_path):
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b", "responses": "odd", "wins": "odd"}]
    assert load(tmp_path, rows).examples == [Example(prompt="x", chosen="a", rejected="b", row=0)]
    with pytest.raises(ValueError, match=r"no responses in pairs .*; name the column by columns: responses="):
        load(tmp_path, [{"prompt": "x", "chosen": "a", "rejected": "b"}], "responses")


def test_counts_are_only_read_if_needed(tmp_path):
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b", "wins": 3, "num_labels": n} for n in (4, 2, None)]
    loaded = load(tmp_path, rows, "chosen", "rejected", "wins", "num_labels", max_bad_fraction=1)
    assert loaded.examples == [Example(prompt="x", chosen="a", rejected="b", wins=3, num_labels=4, row=0)]
    assert loaded.skipped == {"wrong_counts": 1, "missing_num_labels": 1}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"preferences": MATRIX, "scores": [1, 2]}, "preferences_and_scores"),
        ({"preferences": [[0.5, 0.9]]}, "preferences must be a list of 2 rows"),
        ({"preferences": [[0.5, 0.9], [0.1]]}, r"preferences\[1\] must be a list of 2 numbers"),
        ({"preferences": [[0.5, 0.9], [0.2, 0.5]]}, r"preferences\[1\]\[0\] = 0.2 and preferences\[0\]\[1\] = 0.9"),
        ({"preferences": [[0.6, 0.9], [0.1, 0.5]]}, r"preferences\[0\]\[0\] = 0.6"),
        ({"preferences": [[0.5, 1.5], [-0.5, 0.5]]}, "must be in 0..1 and add up to 1"),
        ({"preferences": [[0.5, -0.0009], [1, 0.5]]}, "must be in 0..1 and add up to 1"),
        ({"scores": [1, np.bool_(True)]}, "scores must be a list of 2 numbers"),
        ({"scores": [1, "2"]}, "scores must be a list of 2 numbers"),
        ({"scores": [1, True]}, "scores must be a list of 2 numbers"),
        ({"scores": [1, math.inf]}, "not_finite"),
    ],
)
def test_invalid_labels_are_refused(labels, message):
    with pytest.raises(UnusableRow, match=message):
        read_group_labels(labels, 2)


def test_valid_labels():
    assert read_group_labels({}, 2) == {}
    assert read_group_labels({"scores": [1, 0]}, 2) == {"scores": [1.0, 0.0]}
    rounded = [[0.5, 0.3333], [0.667, 0.5]]
    assert read_group_labels({"preferences": rounded}, 2) == {"preferences": rounded}
    assert read_counts({"wins": "2", "num_labels": "3"}) == {"wins": 2, "num_labels": 3}  # strings, as read from CSV


def test_numbers_of_numpy_are_numbers():
    matrix = [list(line) for line in np.array(MATRIX, dtype=np.float32)]
    assert read_group_labels({"preferences": matrix}, 2) == {"preferences": np.float32(MATRIX).tolist()}
    assert read_group_labels({"scores": [np.int64(3), np.float32(0.5)]}, 2) == {"scores": [3.0, 0.5]}
    assert read_pair_labels({"margin": np.float32(0.5)}, ["margin"]) == {"margin": 0.5}
    assert read_counts({"wins": np.int64(2), "num_labels": np.int32(3)}) == {"wins": 2, "num_labels": 3}


@pytest.mark.parametrize("wins", [-1, 4, 1.5, True, "two"])
def test_invalid_counts_are_refused(wins):
    with pytest.raises(UnusableRow, match="wins"):
        read_counts({"wins": wins, "num_labels": 3})


def test_a_group_is_tokenised_and_cut_as_a_whole():
    example = Example(prompt="w0 w1", responses=["w2", "w3 w4 w5", "w2"], scores=[1.0, 2.0, 3.0], row=7)
    arguments = {"tokenizer": tiny.tokenizer(), "fields": ("responses",)}
    (whole,) = tokenize_examples([example], max_length=6, **arguments).examples
    responses = [[5, tiny.EOS], [6, 7, 8, tiny.EOS], [5, tiny.EOS]]
    assert whole == TokenizedExample(prompt=[3, 4], responses=responses, scores=[1.0, 2.0, 3.0], row=7)
    cut = tokenize_examples([example], max_length=5, **arguments)
    assert cut.examples[0].responses == [[5, tiny.EOS], [6, 7, 8], [5, tiny.EOS]]
    assert (cut.report.eos_added, cut.report.responses_cut) == (2, 1)
    with pytest.raises(ValueError, match="dropped 1 for longer_than_max_length"):
        tokenize_examples([example], max_length=5, truncation_mode="drop", **arguments)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("bad", [False, "false", "False", 0, "0"])
def test_every_form_of_a_bad_label_counts(tmp_path, bad):
    """CSV files give labels as text. `kto` accepts each of these values as a label of a bad response."""
    row = {"prompt": "Say it.", "completion": "It."}
    rows = [row | {"label": True}, row | {"label": bad}, row | {"label": None}]
    with pytest.raises(ValueError, match=r"label is false in 1 of 3 rows, .*columns: reference=completion"):
        load_examples(write_rows(tmp_path / "rows.jsonl", rows), needs=("prompt", "reference"))
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_rows(tmp_path / "talks.jsonl", [talk | {"label": True}, talk | {"label": bad}])
    with pytest.raises(ValueError, match=r"label is false in 1 of 2 rows, .*columns: messages=messages"):
        load_examples(path, needs=("prompt", "reference"))
    asked = load_examples(path, needs=("prompt", "reference"), columns={"messages": "messages"})
    assert len(asked.examples) == 2


def test_a_label_of_another_kind_is_a_column_that_is_not_used(tmp_path):
    row = {"prompt": "Say it.", "completion": "It."}
    path = write_rows(tmp_path / "rows.jsonl", [row | {"label": number} for number in range(3)])
    assert len(load_examples(path, needs=("prompt", "reference")).examples) == 3


def test_unused_columns_with_text_in_lists_and_objects_are_named(tmp_path):
    row = {
        "prompt": "q",
        "completion": "a",
        "history": [["b", "c"]],
        "meta": {"id": {"name": "x"}},
        "n": [1],
        "e": [" "],
    }
    summary = load_examples(write_rows(tmp_path / "rows.jsonl", [row]), needs=("prompt", "reference")).summary()
    assert summary.endswith("none skipped; columns not used in prompt or response: history, meta")
