"""Tests of `dataset_name` as a list of entries: from Python, YAML and flags, and in config.yaml."""

import os
import re
from pathlib import Path

import pytest

from fastrlhf.config import DPOConfig, SFTConfig, Source
from fastrlhf.config.command_line import parse
from fastrlhf.config.compare import differences
from fastrlhf.config.files import as_yaml, names_folder
from fastrlhf.config.paths import as_given, at_start, places_of
from fastrlhf.config.sources import dataset_names, labels_of, read_sources, weighted

ENTRIES = (Source("007", weight=2.0, columns="prompt=question"), Source("b.jsonl"))


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig])
def test_entries_are_sources_mappings_or_names(kind):
    given = [{"path": "007", "weight": 2, "columns": {"prompt": "question"}}, "b.jsonl"]
    assert kind(dataset_name=given).dataset_name == ENTRIES
    assert kind(dataset_name=[*ENTRIES]).dataset_name == ENTRIES
    assert kind(dataset_name={"path": Path("b.jsonl"), "split": None}).dataset_name == ENTRIES[1:]
    assert kind(dataset_name=["a", "b"]).dataset_name == ("a", "b")
    assert kind(dataset_name="a").dataset_name == "a"


def test_entries_in_yaml_and_in_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "007")
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name:\n- {path: $DATA, weight: 2, columns: {prompt: question}}\n- path: b.jsonl\n")
    assert parse(SFTConfig, ["--config", str(file)], "sft").dataset_name == ENTRIES
    for flags in (
        ['[{"path": "007", "weight": 2, "columns": "prompt=question"}, "b.jsonl"]'],
        ["[{path: '007', weight: 2.0, columns: {prompt: question}}, {path: b.jsonl}]"],
        ['{"path": "007", "weight": 2, "columns": "prompt=question"}', "b.jsonl"],
    ):
        assert parse(SFTConfig, ["--config", str(file), "--dataset_name", *flags], "sft").dataset_name == ENTRIES
    written = tmp_path / "config.yaml"
    written.write_text(as_yaml(SFTConfig(dataset_name=ENTRIES)))
    assert parse(SFTConfig, ["--config", str(written)], "sft").dataset_name == ENTRIES


def test_a_file_with_brackets_in_its_name_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = '["a"].jsonl'
    Path(name).touch()
    assert read_sources(name) == name
    assert read_sources("[a].jsonl") == "[a].jsonl"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"path": "a", "weight": 0}], "dataset_name[0]: weight: must be a number above 0; got 0"),
        (["a", {"path": "b", "weight": -1.5}], "dataset_name[1]: weight: must be a number above 0; got -1.5"),
        ([{"path": "a", "weight": "many"}], "dataset_name[0]: weight: must be a number above 0; got 'many'"),
        ([{"path": "a", "weight": True}], "dataset_name[0]: weight: must be a number above 0; got True"),
        ([{"path": "a", "weight": float("inf")}], "dataset_name[0]: weight: must be a number above 0; got inf"),
        (
            ["a", {"path": "b", "wieght": 2}],
            "dataset_name[1]: unknown key 'wieght'; an entry has the keys path, weight, columns, split, config",
        ),
        ([{"weight": 2}], "dataset_name[0]: path is missing; give a hub name, or a local file or folder"),
        ([{"path": "a", "split": 3}], "dataset_name[0]: split: must be text; got 3"),
        (
            [{"path": "a"}, 3],
            "dataset_name[1]: must be a name, or a mapping with the keys path, weight, columns, split, config; got 3",
        ),
        ([3], "dataset_name: must be text or a list of texts or a list of mappings; got [3]"),
    ],
)
def test_a_bad_entry_is_named_by_its_index(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SFTConfig(dataset_name=value)


def test_columns_of_an_entry_and_broken_text():
    with pytest.raises(ValueError, match=r"^dataset_name\[1\]: columns: 'question' must look like prompt=question"):
        SFTConfig(dataset_name=["a", {"path": "b", "columns": "question"}])
    with pytest.raises(ValueError, match=r"^dataset_name: '\[\{' is neither JSON nor YAML"):
        SFTConfig(dataset_name="[{")


def test_names_and_labels():
    sources = (Source("data/a.jsonl.gz"), Source("owner/Set"), Source("other/a.csv"))
    assert dataset_names(sources) == ("data/a.jsonl.gz", "owner/Set", "other/a.csv")
    assert dataset_names("a") == ("a",)
    assert weighted(("a", "b")) == weighted("a") == ()
    assert labels_of(sources) == ["a_0", "Set", "a_2"]
    assert labels_of((Source("p"), Source("q/p"), Source("p_0"))) == ["p_0", "p_1", "p_0_2"]


def test_paths_are_resolved_at_the_start_and_written_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    given = [{"path": "a.jsonl", "weight": 2.0}, {"path": "owner/set"}]
    config = at_start(SFTConfig(dataset_name=given), SFTConfig, "train_sft")
    assert dataset_names(config.dataset_name) == (str(tmp_path / "a.jsonl"), "owner/set")
    assert [entry["path"] for entry in as_given(config)["dataset_name"]] == ["a.jsonl", "owner/set"]
    assert names_folder([{"dataset_name": given}], str(tmp_path / "a.jsonl"))
    assert not names_folder([{"dataset_name": given}], str(tmp_path / "b"))

    written = tmp_path / "config.yaml"
    written.write_text(places_of(config) + as_yaml(config))
    assert differences(config, written) == []
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert differences(config, written) == []  # the same files, from another folder
    elsewhere = SFTConfig(dataset_name=[{"path": os.path.join("..", "a.jsonl"), "weight": 2}, "owner/set"])
    assert differences(at_start(elsewhere, SFTConfig, "train_sft"), written) == []


@pytest.mark.parametrize(
    "changed",
    [
        [{"path": "a.jsonl", "weight": 3.0}, "b.jsonl"],
        [{"path": "c.jsonl", "weight": 2.0}, "b.jsonl"],
        ["b.jsonl", {"path": "a.jsonl", "weight": 2.0}],
        [{"path": "a.jsonl", "weight": 2.0, "split": "train"}, "b.jsonl"],
        [{"path": "a.jsonl", "weight": 2.0}],
        ["a.jsonl", "b.jsonl"],
    ],
)
def test_another_weight_path_order_or_split_is_a_difference(tmp_path, monkeypatch, changed):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.jsonl").touch()

    def started(dataset_name):
        return at_start(SFTConfig(dataset_name=dataset_name), SFTConfig, "train_sft")

    first = started([{"path": "a.jsonl", "weight": 2.0}, "b.jsonl"])
    written = tmp_path / "config.yaml"
    written.write_text(places_of(first) + as_yaml(first))
    [told] = differences(started(changed), written)
    assert told.startswith("dataset_name: [")
