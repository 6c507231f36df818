"""Tests of the short pairs that `python -m bench real` reads from FASTRLHF_DATA."""

import gzip
import json

import pytest

from bench.real.rows import FILES, num_characters, short_pairs, write_rows


def turns(text):
    return [{"role": "user", "content": text}]


def test_the_shortest_pairs_of_a_least_length_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRLHF_DATA", str(tmp_path))
    rows = [
        {"prompt": turns("p" * n), "chosen": turns("c"), "rejected": turns("r"), "x": 1} for n in (300, 97, 98, 120)
    ]
    with gzip.open(tmp_path / FILES["chat"], "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = short_pairs("chat", 2)
    assert [num_characters(row) for row in found] == [100, 122]
    assert found[0] == {"prompt": turns("p" * 98), "chosen": turns("c"), "rejected": turns("r")}
    path = write_rows(found, tmp_path / "rows.jsonl")
    with open(path) as file:
        assert [json.loads(line) for line in file] == found


def test_the_missing_variable_is_named(monkeypatch):
    monkeypatch.delenv("FASTRLHF_DATA", raising=False)
    with pytest.raises(RuntimeError, match=r"^FASTRLHF_DATA: set this variable to a folder"):
        short_pairs("text", 1)
