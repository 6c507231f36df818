"""Damages rows of every format at random.

A damaged row must become an example, or be skipped and counted with its position. The other rows must stay unchanged,
and no other error may be raised.
"""

import json
import math
import random
from copy import deepcopy

import pytest

from fastrlhf.data.examples import load_examples

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def hh(i: int, answer: str) -> str:
    return f"\n\nHuman: Q{i}?\n\nAssistant: {answer}"


PAIR = ("chosen", "rejected")
GROUP = {"responses": ["a", "b"], "preferences": [[0.5, 0.7], [0.3, 0.5]]}
FORMS = {
    "pairs": (lambda i: {"prompt": f"Q{i}", "chosen": "a", "rejected": "b"}, PAIR),
    "conversation pairs": (
        lambda i: {"prompt": user(f"Q{i}"), "chosen": assistant("a"), "rejected": assistant("b")},
        PAIR,
    ),
    "demonstrations": (lambda i: {"prompt": f"Q{i}", "completion": "a"}, ("reference",)),
    "HH text": (lambda i: {"chosen": hh(i, "a"), "rejected": hh(i, "b")}, PAIR),
    "HH messages": (
        lambda i: {"chosen": user(f"Q{i}") + assistant("a"), "rejected": user(f"Q{i}") + assistant("b")},
        PAIR,
    ),
    "messages": (lambda i: {"messages": user(f"Q{i}") + assistant("a")}, ("reference",)),
    "prompts": (lambda i: {"prompt": f"Q{i}"}, ()),
    "comparisons": (
        lambda i: {
            "info": {"subreddit": "r", "title": "t", "post": f"Q{i}"},
            "summaries": [{"text": "a"}, {"text": "b"}],
            "choice": i % 2,
        },
        PAIR,
    ),
    "posts": (lambda i: {"subreddit": "r", "title": "t", "post": f"Q{i}", "summary": "a"}, ("reference",)),
    "groups": (lambda i: {"prompt": f"Q{i}"} | GROUP, ("responses", "preferences", "scores")),
    "scored groups": (
        lambda i: {"prompt": f"Q{i}", "responses": ["a", "b"], "scores": [1.0, i]},
        ("responses", "preferences", "scores"),
    ),
    "UltraFeedback": (
        lambda i: {
            "instruction": f"Q{i}",
            "completions": [{"response": x, "overall_score": 1.0 * i} for x in ("a", "b")],
        },
        ("responses", "scores"),
    ),
    "soft labels": (
        lambda i: {"prompt": f"Q{i}", "chosen": "a", "rejected": "b", "label_prob": 0.9, "margin": 1.5},
        (*PAIR, "label_prob", "margin"),
    ),
    "counts": (
        lambda i: {"prompt": f"Q{i}", "chosen": "a", "rejected": "b", "wins": 3, "num_labels": 4},
        (*PAIR, "wins", "num_labels"),
    ),
}
"""Format name -> (function from a number to a good row, fields that are needed)."""

JUNK = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**400,
        -(10**400),
        math.nan,
        math.inf,
        "",
        " \n\t",
        "x",
        "3",
        "\ud800",
        "\u202e",
    ),
    *("\x00", "\U0001f600", "nan", "1e999", [], [None], [[]], [1, 2], ["", ""], {}, {"role": "user"}, [{"role": 1}]),
    *([{"role": "system", "content": "x"}], [{"role": "assistant", "content": "\udfff"}], {"x": {"y": [{}]}}),
    *([[0.5, math.nan], [0.3, 0.5]], [math.inf, 1.0], [10**400, 1], {"\ud800": 1}, hh(0, ""), "\n\nHuman:"),
]
COLUMNS = ("prompt", "completion", "reference", "chosen", "rejected", "messages", "responses", "scores")
NUM_ROWS = 5


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Returns the places in a row that may be changed: the row itself, its values, and the values that these
    contain."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def damaged(row: dict, draw: random.Random) -> object:
    """Returns a copy of the row in which one element is dropped, replaced, added, wrapped or doubled."""
    holder = {"row": deepcopy(row)}
    *above, key = ("row", *draw.choice(places(row)))
    inside = holder
    for step in above:
        inside = inside[step]
    junk = deepcopy(draw.choice(JUNK))
    match draw.choice(["replace", "replace", "drop", "wrap", "add", "double"]):
        case "drop" if above:
            del inside[key]
        case "wrap":
            inside[key] = draw.choice([[inside[key]], {"text": inside[key]}])
        case "add" if isinstance(inside[key], dict):
            inside[key][draw.choice(["extra", "\ud800", "", "content", *COLUMNS])] = junk
        case "double" if isinstance(inside[key], str | list):
            inside[key] = inside[key] * 2
        case _:
            inside[key] = junk
    return holder["row"]


def load(folder, rows, needs):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(path), needs=needs, max_bad_fraction=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("form", FORMS)
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
@hypothesis.given(seed=st.integers(0, 2**32), which=st.sets(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=2))
def test_a_damaged_row_affects_no_other_row(folder, form, seed, which):
    """Fewer than half of the rows are damaged, so that the others determine the format."""
    make, needs = FORMS[form]
    draw = random.Random(seed)
    good = [make(i) for i in range(NUM_ROWS)]
    expected = load(folder, good, needs).examples
    rows = [damaged(row, draw) if i in which else row for i, row in enumerate(good)]
    loaded = load(folder, rows, needs)

    found = {example.row: example for example in loaded.examples}
    assert list(found) == sorted(found)
    assert loaded.num_rows == NUM_ROWS == len(found) + sum(loaded.skipped.values())
    for i in set(range(NUM_ROWS)) - which:
        assert found[i] == expected[i]
    lost = [i for i in range(NUM_ROWS) if i not in found]
    if lost:
        assert loaded.first_bad.startswith(f"row {lost[0]} (rows.jsonl line {lost[0] + 1}): ")
    else:
        assert loaded.first_bad is None
    for example in loaded.examples:
        json.dumps([example.prompt, *(getattr(example, name) for name in needs)], allow_nan=False).encode()
        assert example.prompt.strip() if isinstance(example.prompt, str) else example.prompt
    loaded.summary().encode()


@pytest.mark.parametrize("form", FORMS)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(seed=st.integers(0, 2**32))
def test_if_every_row_is_damaged_there_are_examples_or_one_error(folder, form, seed):
    make, needs = FORMS[form]
    draw = random.Random(seed)
    rows = [damaged(make(i), draw) for i in range(NUM_ROWS)]
    try:
        loaded = load(folder, rows, needs)
    except ValueError as refusal:
        told = str(refusal)
    else:
        told = loaded.summary()
        assert loaded.num_rows == len(loaded.examples) + sum(loaded.skipped.values())
    assert told.startswith(f"{folder / 'rows.jsonl'}: ")


@pytest.mark.parametrize(("line", "what"), [("[" * 100_000, "recursion"), ('{"prompt": ' + "9" * 5000 + "}", "digits")])
def test_json_that_python_cannot_represent_is_reported_with_its_line(tmp_path, line, what):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl line 2.*: broken JSON, .*{what}"):
        load_examples(str(tmp_path / "rows.jsonl"))
