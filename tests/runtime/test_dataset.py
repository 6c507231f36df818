import csv
import json
import logging
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastrlhf.config import DPOConfig, KTOConfig, RewardConfig, SFTConfig, TrainConfig
from fastrlhf.data import tokens
from fastrlhf.data.examples import load_examples
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.runtime import dataset, token_store
from fastrlhf.runtime.inputs import open_inputs
from tests import tiny

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos>{% endfor %}"
draw = random.Random(0)


def words(most: int = 6) -> str:
    return " ".join(draw.choices(tiny.WORDS, k=draw.randint(1, most)))


def turn(role: str) -> dict[str, str]:
    return {"role": role, "content": words()}


def pair(**more) -> dict:
    return {"prompt": words(), "chosen": "w1 " + words(), "rejected": "w2 " + words(9)} | more


FORMS = {
    "text pairs": (["chosen", "rejected"], lambda i: pair(extra=i)),
    "pairs with labels": (["chosen", "rejected", "margin"], lambda i: pair(margin=i / 3)),
    "demonstrations": (["reference"], lambda i: {"prompt": words(), "completion": words()}),
    "labelled": (["reference", "label"], lambda i: {"prompt": words(), "completion": words(), "label": i % 3 > 0}),
    "conversations": (
        ["reference"],
        lambda i: {"messages": [turn(role) for role in ("user", "assistant") * (1 + i % 3)]},
    ),
    "turns with untrained tokens": (
        ["reference"],
        lambda i: {
            "prompt": [turn("user")],
            "completion": [turn(role) for role in ("assistant", "user", "assistant")[: 1 + 2 * (i % 2)]],
        },
    ),
    "groups": (
        ["responses", "scores"],
        lambda i: {"prompt": words(), "responses": [words() for _ in range(2 + i % 3)], "scores": [0.1] * (2 + i % 3)},
    ),
    "prompts": ([], lambda i: {"prompt": words()}),
    "some rows too long": (["reference"], lambda i: {"prompt": words(3), "completion": words(3 + 60 * (i % 4 == 0))}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def write(folder: Path, form: str, num: int = 40, name: str = "rows.jsonl") -> None:
    rows = [FORMS[form][1](i) for i in range(num)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, kind: type[TrainConfig] = SFTConfig, **keys) -> TrainConfig:
    keys = {"max_length": 40, "num_eval_examples": 8} | keys
    return kind(
        tokenizer_name_or_path=str(folder / "tokenizer"),
        model_config=json.dumps({"model_type": "llama"}),
        dataset_name=keys.pop("dataset_name", str(folder / "rows.jsonl")),
        dataset_cache_dir=str(folder / "store"),
        device="cpu",
        **keys,
    )


def start(config: TrainConfig, fields, **keys):
    return open_inputs(config, fields, None, None, **keys)[1]


def refuse_tokenizer(monkeypatch) -> None:
    def call(self, *arguments, **keywords):
        raise AssertionError("the tokenizer was called")

    for name in ("__call__", "_encode_plus"):
        monkeypatch.setattr(PreTrainedTokenizerFast, name, call)
    monkeypatch.setattr(dataset, "load_examples", call)
    monkeypatch.setattr(dataset, "tokenize_examples", call)


@pytest.mark.parametrize("form", FORMS)
def test_stored_rows_are_those_of_direct_tokenisation_and_the_second_start_reads_no_row(
    folder, form, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    fields, _ = FORMS[form]
    write(folder, form)
    config = config_of(folder)
    direct = tokenize_examples(
        load_examples(config.dataset_name, needs=("prompt", *fields)).examples,
        tiny_tokenizer(folder),
        max_length=40,
        fields=[name for name in fields if name not in ("label", "margin", "scores")],
    )
    monkeypatch.setattr(tokens, "CHUNK", 7)
    first, told = start(config, fields), caplog.messages[:]
    caplog.clear()
    refuse_tokenizer(monkeypatch)
    second = start(config, fields)
    rows = [row for row in direct.examples if row.row < 32]
    assert first.train == rows
    assert second.train == rows
    assert first.eval == second.eval == [row for row in direct.examples if row.row >= 32]
    assert first.report == second.report
    assert first.fingerprint == second.fingerprint
    assert (first.conversations, first.origin) == (second.conversations, second.origin)
    assert caplog.messages == told
    assert len([message for message in told if "within 40 tokens" in message]) == 2


def tiny_tokenizer(folder: Path):
    return PreTrainedTokenizerFast.from_pretrained(str(folder / "tokenizer"))


def test_chunks_in_processes_give_the_rows_and_the_report_of_one_chunk(folder, monkeypatch):
    write(folder, "some rows too long", 60)
    config = config_of(folder, max_length=20, max_dropped_fraction=1.0, truncation_mode="drop")
    whole = start(config, ["reference"])
    monkeypatch.setattr(tokens, "CHUNK", 7)
    parts = start(replace(config, dataset_cache_dir=str(folder / "other"), dataset_num_proc=3), ["reference"])
    assert parts.train == whole.train
    assert parts.report == whole.report
    assert list(parts.report.dropped.items()) == list(whole.report.dropped.items())
    assert len(parts.report.dropped_rows["longer_than_max_length"]) == 5


def test_a_changed_key_file_or_tokenizer_is_another_entry(folder, monkeypatch):
    write(folder, "text pairs")
    config, fields = config_of(folder, DPOConfig), ["chosen", "rejected"]
    start(config, fields)
    keys = {path.name for path in (folder / "store").iterdir()}
    assert len(keys) == 2  # train and eval

    def new() -> int:
        """Returns how many entries were added since the previous call."""
        nonlocal keys
        now = {path.name for path in (folder / "store").iterdir()}
        added, keys = now - keys, now
        return len(added)

    for change in (
        {"max_length": 39},
        {"truncation_mode": "drop"},
        {"trailing_space": "response"},
        {"system_prompt": "w1"},
        {"columns": "chosen=rejected,rejected=chosen"},
        {"chat_template_kwargs": '{"a": 1}'},
        {"max_bad_fraction": 0.2},
        {"max_dropped_fraction": 0.6},
        {"max_train_examples": 30},
        {"num_eval_examples": 9},
        {"train_suffix": True},
    ):
        start(replace(config, **change), fields)
        assert new() == 2, change
    start(replace(config, learning_rate=1e-3, seed=3, micro_batch_tokens=99, dataset_num_proc=1), fields)
    assert new() == 0
    start(config, ["chosen"])
    assert new() == 2
    write(folder, "text pairs")  # other words
    changed = start(config, fields)
    assert new() == 2
    assert changed.train[0].chosen == [*tiny.ids(json.loads((folder / "rows.jsonl").open().readline())["chosen"]), 1]
    tokenizer = tiny_tokenizer(folder)
    tokenizer.add_tokens(["w1 w2"])
    tokenizer.save_pretrained(folder / "tokenizer")
    start(config, fields)
    assert new() == 2
    monkeypatch.setattr(dataset, "code_fingerprint", lambda: "of another version")
    start(config, fields)
    assert new() == 2


def test_answers_that_are_trained_are_a_part_of_the_key(folder):
    turns = [{"role": role, "content": "w1 w2"} for role in ("user", "assistant") * 2]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = config_of(folder, SFTConfig, num_eval_examples=0)
    last, every = (
        start(replace(config, train_on=which), ["reference"]).train[0].reference
        for which in ("last_assistant", "all_assistant")
    )
    assert len(every) > len(last)


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder", "saved", "two files"])
def test_every_kind_of_source_has_a_fingerprint_of_its_content(folder, kind, monkeypatch):
    def make() -> str | tuple[str, ...]:
        rows = [pair() for _ in range(12)]
        place = folder / "rows.csv"
        match kind:
            case "csv":
                with place.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
            case "parquet":
                place = folder / "rows.parquet"
                Dataset.from_list(rows).to_parquet(str(place))
            case "folder":
                place = folder / "data"
                place.mkdir(exist_ok=True)
                write(folder, "text pairs", 12, "data/train.jsonl")
            case "saved":
                place = folder / f"saved{len(list(folder.glob('saved*')))}"
                Dataset.from_list(rows).save_to_disk(str(place))
            case _:
                write(folder, "text pairs", 12, "a.jsonl")
                write(folder, "text pairs", 12, "b.jsonl")
                return str(folder / "a.jsonl"), str(folder / "b.jsonl")
        return str(place)

    fields = ["chosen", "rejected"]
    config = config_of(folder, RewardConfig, dataset_name=make(), num_eval_examples=0)
    first = start(config, fields)
    with monkeypatch.context() as patched:
        refuse_tokenizer(patched)
        assert start(config, fields).train == list(first.train)
    config = replace(config, dataset_name=make())
    assert start(config, fields).train != list(first.train)


def test_rows_kept_with_their_text_come_from_the_store_too(folder, monkeypatch):
    write(folder, "demonstrations")
    config = config_of(folder)
    first = start(config, ["reference"])
    read = dataset.load_examples
    refuse_tokenizer(monkeypatch)
    monkeypatch.setattr(dataset, "load_examples", read)
    kept = start(config, ["reference"], keep_rows=True)
    assert kept.train == first.train
    assert [row.source.row for row in kept.train] == first.train.rows()
    assert first.train[0].source is None
    assert set(kept.eval_rows) == {32, 33, 34, 35, 36, 37, 38, 39}


def test_labels_come_back_with_their_types(folder):
    write(folder, "labelled")
    config = config_of(folder, KTOConfig)
    for _ in range(2):
        data = start(config, ["reference", "label"])
        assert [row.label for row in data.train] == [i % 3 > 0 for i in range(32)]


@pytest.mark.parametrize("damage", ["bytes", "cut", "missing", "manifest", "part"])
def test_a_damaged_entry_is_made_again_with_a_warning(folder, damage, caplog):
    write(folder, "demonstrations")
    config = config_of(folder, num_eval_examples=0)
    first = start(config, ["reference"])
    expected, (entry,) = list(first.train), (folder / "store").iterdir()
    file = entry / {"manifest": "manifest.json", "part": "part.json"}.get(damage, "tokens.npy")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-4])
    else:
        # a copy: the bytes of a mapped file must not change under the first run
        file.unlink()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert start(config, ["reference"]).train == expected
    (warning,) = [message for message in caplog.messages if "is damaged" in message]
    assert warning.startswith(f"dataset_cache_dir: {entry} is damaged, so the rows are tokenised again: ")
    caplog.clear()
    assert start(config, ["reference"]).train == expected
    assert not [message for message in caplog.messages if "is damaged" in message]


@pytest.mark.parametrize("moment", [0, 4, 8, "facts", "rename"])
def test_a_process_killed_while_it_writes_leaves_no_entry_and_the_next_start_is_right(folder, moment, monkeypatch):
    write(folder, "demonstrations")
    config = config_of(folder, num_eval_examples=0)
    calls = []

    def killed(*arguments, **keywords) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(file, array, write=np.save) -> None:
        calls.append(file)
        if len(calls) > moment:
            killed()
        write(file, array)

    def run() -> None:
        start(config, ["reference"])

    with monkeypatch.context() as patched:
        if moment == "rename":
            patched.setattr(os, "rename", killed)
        elif moment == "facts":
            patched.setattr(token_store, "asdict", killed)
        else:
            patched.setattr(np, "save", save)
        child = multiprocessing.get_context("fork").Process(target=run)
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (left,) = (folder / "store").iterdir()
    assert left.name.endswith(".partial")
    assert [row.reference for row in start(config, ["reference"]).train] == [
        [*tiny.ids(json.loads(line)["completion"]), tiny.EOS] for line in (folder / "rows.jsonl").open()
    ]
    assert len([path for path in (folder / "store").iterdir() if not path.name.startswith(".")]) == 1


def test_a_file_that_changes_while_it_is_read_is_not_kept(folder, monkeypatch):
    write(folder, "demonstrations")
    config, read = config_of(folder, num_eval_examples=0), dataset.load_examples

    def changing(*arguments, **keywords):
        loaded = read(*arguments, **keywords)
        write(folder, "demonstrations")
        return loaded

    monkeypatch.setattr(dataset, "load_examples", changing)
    start(config, ["reference"])
    assert not (folder / "store").exists()


def test_a_store_that_cannot_be_written_is_a_warning_and_the_rows_stay_in_memory(folder, caplog):
    write(folder, "demonstrations")
    (folder / "store").write_text("a file, not a folder")
    config = config_of(folder, num_eval_examples=0)
    assert len(start(config, ["reference"]).train) == 40
    (warning,) = [message for message in caplog.messages if "dataset_cache_dir" in message]
    assert warning.startswith(f"dataset_cache_dir: {folder / 'store'} cannot be written, so the next start tokenises ")
