import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from fastrlhf.data.examples import load_examples

PAIR = ("chosen", "rejected")
REFERENCE = ("reference",)
real_data = pytest.mark.skipif("FASTRLHF_DATA" not in os.environ, reason="FASTRLHF_DATA is not a folder with samples")


def sample(name: str) -> str:
    return str(Path(os.environ["FASTRLHF_DATA"]) / f"{name}.jsonl.gz")


def sample_rows(name: str) -> list[dict]:
    with gzip.open(sample(name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(*turns: str) -> str:
    marks = ["\n\nHuman: ", "\n\nAssistant: "]
    return "".join(marks[i % 2] + turn for i, turn in enumerate(turns))


def only(path: str, **arguments) -> tuple:
    (example,) = load_examples(path, **arguments).examples
    return example.prompt, example.chosen, example.rejected, example.reference


def reason_of(path: Path, row: object, good: list, **arguments) -> str:
    """Returns the reason for which a row is skipped; good rows precede it and determine the format."""
    loaded = load_examples(write(path, [*good, row]), max_bad_fraction=0.5, **arguments)
    assert loaded.first_bad is not None
    assert loaded.first_bad.startswith(f"row {len(good)} ({path.name} line {len(good) + 1})")
    assert len(loaded.examples) == len(good)
    ((reason, count),) = loaded.skipped.items()
    assert count == 1
    return reason


# Row formats. ---------------------------------------------------------------


def test_text_pairs_are_unchanged(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q:", "chosen": " yes\n", "rejected": " no"}])
    assert only(path, needs=PAIR) == ("Q:", " yes\n", " no", None)


def test_conversational_pairs_keep_their_turns_and_lose_other_keys(tmp_path):
    row = {"prompt": [user("hi") | {"name": None}], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    expected = ([user("hi")], [assistant("a")], [assistant("b")], None)
    assert only(write(tmp_path / "a.jsonl", [row]), needs=PAIR) == expected


def test_every_column_but_that_of_the_prompt_stays_with_its_example(tmp_path):
    row = {"q": "Q:", "chosen": "a", "rejected": "b", "margin": 2, "answer": ["x"], "completion": None}
    path = write(tmp_path / "a.jsonl", [row])
    (example,) = load_examples(path, needs=PAIR, columns={"prompt": "q"}).examples
    others = {"chosen": "a", "rejected": "b", "margin": 2, "answer": ["x"], "completion": None}
    assert example.columns == others


def test_an_implicit_prompt_is_all_turns_before_the_last(tmp_path):
    start = [user("hi"), assistant("hello"), user("why?")]
    row = {"chosen": [*start, assistant("a")], "rejected": [*start, assistant("b")]}
    assert only(write(tmp_path / "a.jsonl", [row]), needs=PAIR) == (start, [assistant("a")], [assistant("b")], None)


def test_raw_human_assistant_text_becomes_stripped_turns(tmp_path):
    row = {"chosen": human("hi ", " hello", "why?", "a"), "rejected": human("hi", "hello", "why?", "b\n")}
    start = [user("hi"), assistant("hello"), user("why?")]
    assert only(write(tmp_path / "a.jsonl", [row]), needs=PAIR) == (start, [assistant("a")], [assistant("b")], None)


def test_a_turn_marker_inside_a_line_starts_no_turn(tmp_path):
    row = {"chosen": human("say Human: or\nAssistant: x", "a"), "rejected": human("say Human: or\nAssistant: x", "b")}
    assert only(write(tmp_path / "a.jsonl", [row]), needs=PAIR)[0] == [user("say Human: or\nAssistant: x")]


def test_whole_conversations_with_a_prompt_are_cut_to_one_turn(tmp_path):
    whole = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}
    expected = ([user("hi")], [assistant("a")], [assistant("b")], None)
    assert only(write(tmp_path / "a.jsonl", [{"prompt": "hi", **whole}]), needs=PAIR) == expected
    assert only(write(tmp_path / "b.jsonl", [{"prompt": [user("hi")], **whole}]), needs=PAIR) == expected


def test_a_completion_and_the_last_message_are_references(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    assert only(path, needs=REFERENCE) == ("Q", None, None, "A")
    path = write(tmp_path / "b.jsonl", [{"messages": [user("Q"), assistant("A")]}])
    assert only(path, needs=REFERENCE) == ([user("Q")], None, None, [assistant("A")])


def test_prompts_suffice_if_nothing_else_is_needed(tmp_path):
    assert only(write(tmp_path / "a.jsonl", [{"prompt": "Q", "id": 7}])) == ("Q", None, None, None)


def test_openai_comparisons_and_tldr_posts_share_one_prompt(tmp_path):
    post = {"subreddit": "cats", "title": "Help", "post": "My cat."}
    prompt = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: My cat.\n\nTL;DR:"
    comparison = {"info": post, "summaries": [{"text": " one"}, {"text": " two"}], "choice": 1}
    assert only(write(tmp_path / "a.jsonl", [comparison]), needs=PAIR) == (prompt, " two", " one", None)
    assert only(write(tmp_path / "b.jsonl", [post | {"summary": "Cat"}])) == (prompt, None, None, " Cat")


def test_the_form_is_the_first_that_has_what_is_needed(tmp_path):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "messages": [user("Q"), assistant("m")]}
    path = write(tmp_path / "a.jsonl", [row])
    assert only(path, needs=PAIR) == ("Q", "a", "b", None)
    assert only(path, needs=REFERENCE) == ([user("Q")], None, None, [assistant("m")])


def test_columns_are_renamed_by_flag(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Q", "chosen": "x", "better": "a", "worse": "b"}])
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse", "reference": "better"}
    assert only(path, columns=columns, needs=(*PAIR, "reference")) == ("Q", "a", "b", "a")


# Sources and limits. --------------------------------------------------------


def test_examples_are_numbered_by_their_place_in_the_split(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "a"}])
    write(tmp_path / "test.jsonl", [{"prompt": "b"}, {"prompt": ""}, {"prompt": "c"}])
    loaded = load_examples(str(tmp_path), split="test", max_bad_fraction=0.5)
    assert [(example.row, example.prompt) for example in loaded.examples] == [(0, "b"), (2, "c")]


def test_a_hub_dataset_is_asked_for_by_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.Dataset.from_list([{"prompt": "Q"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("owner/name", config_name="small", split="test").examples[0].prompt == "Q"
    assert asked == [(("owner/name", "small"), {"split": "test"})]


def test_limit_counts_rows_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": ""}, {"prompt": "c"}])
    loaded = load_examples(path, limit=2, max_bad_fraction=0.5)
    assert (loaded.num_rows, len(loaded.examples), loaded.skipped) == (2, 1, {"empty_prompt": 1})


# Rows that cannot be used. --------------------------------------------------

TEXT = {"prompt": "Q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
HH = {"chosen": human("Q", "a"), "rejected": human("Q", "b")}
OPENAI = {
    "info": {"subreddit": "s", "title": "t", "post": "p"},
    "summaries": [{"text": " a"}, {"text": " b"}],
    "choice": 0,
}


@pytest.mark.parametrize(
    ("reason", "good", "bad"),
    [
        ("chosen_equals_rejected", TEXT, TEXT | {"rejected": "a"}),
        ("empty_prompt", TEXT, TEXT | {"prompt": " \n"}),
        ("empty_response", TEXT, TEXT | {"rejected": " "}),
        ("missing_prompt", TEXT, TEXT | {"prompt": None}),
        ("missing_rejected", TEXT, {"prompt": "Q", "chosen": "a"}),
        ("wrong_type", TEXT, TEXT | {"chosen": 3}),
        ("wrong_type", TEXT, TEXT | {"chosen": "half a pair \ud800"}),
        ("wrong_type", TEXT, CHAT),
        ("wrong_type", TEXT, ["not", "an", "object"]),
        ("wrong_type", CHAT, CHAT | {"prompt": 3}),
        ("wrong_type", CHAT, CHAT | {"prompt": [{"role": "user", "content": None}]}),
        ("missing_prompt", CHAT, CHAT | {"prompt": None}),
        ("empty_prompt", CHAT, CHAT | {"prompt": []}),
        ("empty_response", CHAT, CHAT | {"chosen": [assistant("")]}),
        ("response_not_by_assistant", CHAT, CHAT | {"chosen": [user("a")]}),
        ("response_not_by_assistant", CHAT, CHAT | {"chosen": [assistant("a"), user("b")]}),
        ("response_not_by_assistant", CHAT, CHAT | {"chosen": []}),
        ("prompts_differ", HH, HH | {"rejected": human("R", "b")}),
        ("prompts_differ", HH, HH | {"rejected": human("Q", "a", "b", "c")}),
        ("roles_do_not_alternate", HH, {"chosen": human("Q", "a", "b"), "rejected": human("Q", "a", "c")}),
        ("empty_turn", HH, HH | {"rejected": human("Q", "")}),
        ("empty_turn", HH, {"chosen": human("Q", " ", "b", "c"), "rejected": human("Q", " ", "b", "d")}),
        ("chosen_equals_rejected", HH, HH | {"rejected": human("Q", "a ")}),
        ("not_human_assistant_text", HH, {"chosen": "a", "rejected": "b"}),
        ("not_human_assistant_text", HH, HH | {"rejected": "system" + human("Q", "b")}),
        ("missing_rejected", HH, {"chosen": human("Q", "a")}),
        ("missing_chosen", HH, {}),
        ("missing_post", OPENAI, OPENAI | {"info": {"subreddit": "s", "title": "t"}}),
        ("empty_prompt", OPENAI, OPENAI | {"info": {"subreddit": "s", "title": "t", "post": ""}}),
        ("missing_choice", OPENAI, OPENAI | {"choice": None}),
        ("wrong_type", OPENAI, OPENAI | {"choice": 2}),
        ("wrong_type", OPENAI, OPENAI | {"choice": 1.0}),
        ("wrong_type", OPENAI, OPENAI | {"summaries": [{"text": "a"}]}),
        ("empty_response", OPENAI, OPENAI | {"summaries": [{"text": ""}, {"text": " b"}]}),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_under_its_reason(tmp_path, reason, good, bad):
    assert reason_of(tmp_path / "a.jsonl", bad, [good, good], needs=PAIR) == reason


def test_an_invalid_response_that_is_not_needed_does_not_drop_the_row(tmp_path):
    rows = [TEXT | {"rejected": "a"}, TEXT | {"rejected": ""}, TEXT | {"rejected": None}]
    loaded = load_examples(write(tmp_path / "a.jsonl", rows), needs=("prompt", "chosen"))
    assert [example.rejected for example in loaded.examples] == ["a", None, None]
    assert loaded.first_bad is None


def test_too_many_bad_rows_are_an_error_with_counts_and_the_first_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [TEXT] * 8 + [TEXT | {"chosen": "", "id": 5}] * 2)
    assert load_examples(path, needs=PAIR, max_bad_fraction=0.2).skipped == {"empty_response": 2}
    expected = r"2 of 10 rows cannot be used \(2 empty_response\), more than max_bad_fraction 0.19 .* row 8 .*'id': 5"
    with pytest.raises(ValueError, match=expected):
        load_examples(path, needs=PAIR, max_bad_fraction=0.19)


def test_the_summary_names_form_counts_and_first_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [TEXT, TEXT | {"prompt": ""}])
    summary = load_examples(path, needs=PAIR, max_bad_fraction=0.5).summary()
    assert summary.startswith(f"{path}: 1 examples of 2 rows (pairs, text), skipped 1 empty_prompt; the first: row 1 (")
    assert load_examples(path, limit=1).summary() == f"{path}: 1 examples of 1 rows (pairs, text), none skipped"


def test_unpaired_preferences_are_demonstrations_only_on_request(tmp_path):
    row = {"prompt": "Say it.", "completion": "It.", "label": True}
    good = write(tmp_path / "good.jsonl", [row, row])
    assert len(load_examples(good, needs=("prompt", "reference")).examples) == 2
    mixed = write(tmp_path / "mixed.jsonl", [row, row | {"label": False}])
    with pytest.raises(ValueError, match=r"label is false in 1 of 2 rows, .*columns: reference=completion"):
        load_examples(mixed, needs=("prompt", "reference"))
    asked = load_examples(mixed, needs=("prompt", "reference"), columns={"reference": "completion"})
    assert len(asked.examples) == 2
    alpaca = {"instruction": "Say it.", "input": "", "output": "It.", "label": False}
    rows = write(tmp_path / "alpaca.jsonl", [alpaca, alpaca | {"label": True}])
    with pytest.raises(ValueError, match=r"label is false in 1 of 2 rows, .*columns: output=output"):
        load_examples(rows, needs=("prompt", "reference"))
    assert len(load_examples(rows, needs=("prompt", "reference"), columns={"output": "output"}).examples) == 2


# Errors of the whole dataset. -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "split 'train' has no rows"),
        ("a.json", b"[]", "split 'train' has no rows"),
        ("a.csv", b"prompt\n", "split 'train' has no rows"),
        ("a.jsonl", b'{"body": "a", "label": 1}\n', "columns body, label fit no known form.*map them"),
        ("a.jsonl", b"1\n2\n", "rows are not objects"),
        ("a.jsonl", b'{"prompt": ""}\n', "none of 1 rows can be used .1 empty_prompt."),
    ],
)
def test_a_broken_dataset_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(str(tmp_path / name))
    assert type(caught.value) is ValueError
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"no split 'test' among \['train'\]"),
        ({"columns": {"prompt": "question"}}, "has no column 'question' for prompt; it has prompt, completion"),
        ({"columns": {"promt": "prompt"}}, "'promt' is not a name to map; names are prompt, chosen"),
        ({"needs": PAIR}, "no chosen and no rejected in demonstrations .*by columns: chosen=<column>"),
        ({"needs": ("labels",)}, "needs: .*'labels'"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction: 1.5"),
        ({"limit": 0}, "limit: .*; got 0"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(tmp_path, arguments, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    with pytest.raises(ValueError, match=message):
        load_examples(path, **arguments)


# The real samples. ----------------------------------------------------------


@real_data
@pytest.mark.parametrize(
    ("name", "needs", "count"),
    [
        ("hh_helpful_train", PAIR, 1869),
        ("hh_helpful_test", PAIR, 464),
        ("tldr_comparisons", PAIR, 100),
        ("tldr_comparisons_raw", PAIR, 100),
        ("tldr_gpt4judged", PAIR, 1000),
        ("tldr_sft", REFERENCE, 1945),
    ],
)
def test_converted_samples_load_without_a_skip(name, needs, count):
    loaded = load_examples(sample(name), needs=needs)
    assert (loaded.num_rows, len(loaded.examples), loaded.skipped) == (count, count, {})


@real_data
def test_raw_helpful_rows_are_the_pairs_of_the_conversational_files():
    converted = [
        (example.prompt, example.chosen, example.rejected)
        for name in ("hh_helpful_train", "hh_helpful_test")
        for example in load_examples(sample(name), needs=PAIR).examples
    ]
    raw = load_examples(sample("hh_helpful_raw200"), needs=PAIR)
    assert len(raw.examples) == 198
    assert all((example.prompt, example.chosen, example.rejected) in converted for example in raw.examples)


@real_data
@pytest.mark.parametrize("source", ["helpful", "harmless"])
def test_raw_rows_are_skipped_exactly_if_the_converted_files_lack_them(source):
    odd = {row["row"]: row["reason"] for row in sample_rows("hh_odd_rows_raw") if row["source"] == source}
    loaded = load_examples(sample(f"hh_{source}_raw200"), needs=PAIR)
    expected = {row: reason for row, reason in odd.items() if row < 200}
    assert loaded.skipped == Counter(expected.values())
    assert {example.row for example in loaded.examples} == set(range(200)) - set(expected)


@real_data
@pytest.mark.parametrize("index", range(32))
def test_every_odd_row_gets_its_recorded_reason(index, tmp_path):
    row = sample_rows("hh_odd_rows_raw")[index]
    assert reason_of(tmp_path / "a.jsonl", row, [HH, HH], needs=PAIR) == row["reason"]


@real_data
def test_raw_comparisons_are_the_converted_ones():
    raw = load_examples(sample("tldr_comparisons_raw"), needs=PAIR).examples
    assert raw == load_examples(sample("tldr_comparisons"), needs=PAIR).examples


def test_a_named_prompt_column_overrides_a_prompt_built_from_other_columns(tmp_path):
    row = {"subreddit": "a", "title": "b", "post": "c", "summary": "d", "query": "the question"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    columns = {"prompt": "query", "reference": "summary"}
    [example] = load_examples(str(path), columns=columns, needs=("prompt", "reference")).examples
    assert (example.prompt, example.reference) == ("the question", "d")
    [example] = load_examples(str(path), needs=("prompt", "reference")).examples
    assert str(example.prompt).startswith("SUBREDDIT: r/a")


def test_pairs_in_place_of_demonstrations_are_refused_with_the_keys_that_name_chosen(tmp_path):
    told = r"no reference in pairs .* columns: reference=<column>, or use the response chosen \(response of sft, .*"
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match=told):
        load_examples(path, needs=("prompt", "reference"))
    path = write(tmp_path / "b.jsonl", [{"prompt": "Q"}])
    with pytest.raises(ValueError, match=r"no reference in prompts \(prompt\); .* columns: reference=<column>$"):
        load_examples(path, needs=("prompt", "reference"))


def test_numbers_of_a_pair_are_read_if_needed_and_checked(tmp_path):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "label_prob": 1, "gap": 0.5}
    path = write(tmp_path / "a.jsonl", [row])
    [example] = load_examples(path, needs=(*PAIR, "label_prob", "margin"), columns={"margin": "gap"}).examples
    assert (example.label_prob, example.margin) == (1.0, 0.5)
    [example] = load_examples(path, needs=PAIR).examples
    assert (example.label_prob, example.margin) == (None, None)
    with pytest.raises(ValueError, match=r"no margin in pairs .* name the column by columns: margin=<column>"):
        load_examples(path, needs=(*PAIR, "margin"))
    for bad in (1.5, -0.1, None, "one", True, float("nan")):
        path = write(tmp_path / "b.jsonl", [row, row, row | {"label_prob": bad}])
        loaded = load_examples(path, needs=(*PAIR, "label_prob"), max_bad_fraction=0.5)
        assert loaded.skipped == {"bad_label_prob": 1}
