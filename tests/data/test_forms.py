import json

import pytest

from fastrlhf.data.examples import load_examples
from fastrlhf.data.tokens import tokenize_examples
from tests.data.vocabularies import byte_level


def load(tmp_path, *rows: dict, needs=("reference",), **arguments):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), needs=needs, **arguments)


def turns(*said: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def test_sharegpt_gives_demonstrations_and_pairs(tmp_path):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (row,) = load(tmp_path, {"conversations": talk}).examples
    assert (row.prompt, row.reference) == (turns("q"), turns("q", "a")[1:])
    pair = {"conversations": talk[:1], "chosen": talk[1], "rejected": {"from": "gpt", "value": "b"}}
    (row,) = load(tmp_path, pair, needs=("chosen", "rejected")).examples
    assert (row.prompt, row.chosen, row.rejected) == (turns("q"), turns("q", "a")[1:], turns("q", "b")[1:])


def test_alpaca_gives_a_turn_of_the_user(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Hi.", "input": "", "output": "Ho."},
    ]
    first, second = load(tmp_path, *rows).examples
    assert (first.prompt, first.reference) == (turns("Add.\n1 1"), turns("", "2")[1:])
    assert second.prompt == turns("Hi.")


def test_plain_text_pairs_share_their_beginning_as_in_trl(tmp_path):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    (pair,) = load(tmp_path, row, needs=("chosen", "rejected")).examples
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")


def test_plain_text_is_trained_from_its_second_token(tmp_path):
    loaded = load(tmp_path, {"text": "def f"})
    assert loaded.form == "whole texts, text"
    (row,) = tokenize_examples(loaded.examples, byte_level(), max_length=50).examples
    tokens = byte_level().convert_ids_to_tokens
    assert (tokens(row.prompt), tokens(row.reference)) == (["def"], ["\u0120f", "</s>"])
    with pytest.raises(ValueError, match="no chosen"):
        load(tmp_path, {"text": "a"}, needs=("chosen",))


def test_a_system_column_is_a_turn_and_makes_text_a_conversation(tmp_path):
    row = {"system": "Be kind.", "prompt": "q", "chosen": "a", "rejected": "b", "note": "n", "id": 3}
    loaded = load(tmp_path, row, needs=("chosen", "rejected"))
    (pair,) = loaded.examples
    assert pair.prompt == [{"role": "system", "content": "Be kind."}, *turns("q")]
    assert pair.chosen == turns("q", "a")[1:]
    assert loaded.summary().endswith(
        "read as conversations because of the column system), none skipped; "
        "columns not used in prompt or response: note"
    )


def test_text_next_to_turns_becomes_a_turn(tmp_path):
    rows = [{"prompt": "q", "chosen": turns("", "a")[1:], "rejected": "b"}] * 2
    (row, _) = load(tmp_path, *rows, needs=("chosen", "rejected")).examples
    assert (row.prompt, row.chosen, row.rejected) == (turns("q"), turns("", "a")[1:], turns("", "b")[1:])


def test_tools_and_arguments_of_the_template_stay_with_the_row(tmp_path):
    row = {"messages": turns("q", "a"), "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}, "answer": 5}
    (made,) = load(tmp_path, row).examples
    assert made.template == {"tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}
    assert made.columns["answer"] == 5


def test_responses_of_several_turns_start_after_their_common_beginning(tmp_path):
    row = {"chosen": turns("q", "a", "more", "b"), "rejected": turns("q", "c", "more", "d")}
    (pair,) = load(tmp_path, row, needs=("chosen", "rejected")).examples
    assert pair.prompt == turns("q")
    assert [turn["content"] for turn in pair.rejected or ()] == ["c", "more", "d"]
