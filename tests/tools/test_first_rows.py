"""Tests that `inspect` reads the first rows like a run, reads no later rows, and reports this."""

import json

import pytest

from fastrlhf.cli import main
from fastrlhf.config import DPOConfig, DRPOConfig, SFTConfig
from fastrlhf.tools.first_rows import open_first_rows
from fastrlhf.tools.inspect import inspect_rows
from fastrlhf.tools.plan.work import open_work
from tests import tiny

BROKEN = "{broken\n"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    pairs = [
        {"prompt": e.prompt, "completion": e.reference, "chosen": e.chosen, "rejected": e.rejected}
        for e in tiny.examples(12)
    ]
    return [json.dumps(pair) + "\n" for pair in pairs]


@pytest.fixture
def write(tmp_path):
    """Writes the lines of a dataset to a file; returns the keys of a configuration that reads this file."""

    def write(lines) -> dict:
        tiny.tokenizer().save_pretrained(tmp_path)
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        return {
            "tokenizer_name_or_path": str(tmp_path),
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "dataset_cache_dir": str(tmp_path / "tokens"),
            "columns": "reference=completion",
            "per_device_train_batch_size": 4,
            "max_length": 32,
        }

    return write


def numbers(inspection) -> list[int]:
    return [int(row.title.split(":")[0].split(",")[0].removeprefix("row ")) for row in inspection.rows]


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig])
def test_the_first_rows_are_tokenised_as_in_the_run(write, lines, kind):
    config = kind(**write(lines))
    work = open_first_rows(config, 10)
    assert work is not None
    assert list(work.examples) == list(open_work(config, keep_rows=True).examples[:10])
    assert work.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert work.num_read == 10


def test_a_row_behind_the_first_ones_is_not_read(write, lines):
    settings = write([*lines, BROKEN])
    inspection = inspect_rows(SFTConfig(**settings), 2, 10)
    assert numbers(inspection) == [0, 1]
    assert inspection.facts[0] == (
        "only the first 10 rows are read, and all counts are of these rows; --rows all reads every row"
    )
    assert "10 of 10 rows within 32 tokens" in inspection.facts
    assert inspection.facts[-1].split(";")[0].endswith("of them trained")
    assert " tokens in these rows, " in inspection.facts[-1]
    with pytest.raises(ValueError, match=r"rows\.jsonl line 13, column 2: broken JSON"):
        inspect_rows(SFTConfig(**settings), 2, None)


def test_the_counts_are_those_of_the_first_rows(write, lines):
    config = DPOConfig(**write(lines))
    few = inspect_rows(config, 12, 10)  # num is larger, so 12 rows are read, and these are all
    assert few.facts == inspect_rows(config, 12, None).facts
    first = inspect_rows(DPOConfig(**write(lines[:5])), 1).facts
    partial = inspect_rows(DPOConfig(**write(lines)), 1, 5).facts[2:]
    assert partial == [fact.replace("tokens per epoch", "tokens in these rows") for fact in first[:-1]]


def test_the_rows_of_a_small_dataset_are_shown_in_the_order_of_the_run(write, lines):
    config = SFTConfig(**write(lines), seed=3)
    inspection = inspect_rows(config, 4, 12)
    assert numbers(inspection) == open_work(config).batches[0] != [0, 1, 2, 3]
    assert "step 1 of " in inspection.facts[-1]
    assert not any("--rows all" in fact for fact in inspection.facts)


def test_messages_about_bad_rows_have_the_numbers_of_the_file(write, lines):
    bad = [*lines[:2], '{"prompt": "w1", "completion": " "}\n', "\n", *lines[2:]]
    inspection = inspect_rows(SFTConfig(**write(bad)), 4, 5)
    assert numbers(inspection) == [0, 1, 3, 4]
    assert "skipped 1 empty_response:" in inspection.facts
    assert [fact[:32] for fact in inspection.facts if "rows.jsonl line" in fact] == ["  row 2 (rows.jsonl line 3): ref"]


def test_rows_that_are_held_out_are_never_shown(write, lines):
    settings = write(lines) | {"num_eval_examples": 3}
    assert open_first_rows(SFTConfig(**settings), 9) is None  # all training rows
    work = open_first_rows(SFTConfig(**settings), 8)
    assert work is not None
    assert [example.row for example in work.examples] == list(range(8))
    assert "3 rows held out for evaluation" in inspect_rows(SFTConfig(**settings), 1, 9).facts


def test_rows_beyond_max_train_examples_are_neither_counted_nor_shown(write, lines):
    settings = write(lines) | {"max_train_examples": 4}
    assert open_first_rows(SFTConfig(**settings), 6) is None  # reading all rows reads only these
    work = open_first_rows(SFTConfig(**settings, num_eval_examples=2), 6)
    assert work is not None
    assert [example.row for example in work.examples] == list(range(4))


def test_the_allowed_shares_of_bad_rows_hold_for_all_rows(write, lines):
    bad = '{"prompt": "w1", "completion": " "}\n'
    settings = write([bad, bad, *lines, *lines]) | {"max_bad_fraction": 0.1}
    assert numbers(inspect_rows(SFTConfig(**settings), 1, 4)) == [2]
    assert len(inspect_rows(SFTConfig(**settings), 1, None).rows) == 1


def test_if_no_first_row_is_usable_all_rows_are_read(write, lines):
    bad = '{"prompt": "w1", "completion": " "}\n'
    inspection = inspect_rows(SFTConfig(**write([bad, *lines])), 1, 1)
    assert "skipped 1 empty_response:" in inspection.facts
    assert "step 1 of " in inspection.facts[-1]
    with pytest.raises(ValueError, match="none of 3 rows can be used"):
        inspect_rows(SFTConfig(**write([bad] * 3)), 1, 1)


def test_episodes_start_at_the_first_rows(write, lines):
    config = DRPOConfig(**write([*lines, BROKEN]), response_length=12, reset_prob=1.0, reset_min=1)
    inspection = inspect_rows(config, 6, 10)
    assert numbers(inspection) == list(range(6))
    assert all("reset of " in row.title for row in inspection.rows)
    assert inspection.facts[-1].startswith("an update that starts from the first of these rows: 4 episodes, 4 after a")


def test_the_command_reads_the_rows_that_are_asked_for(write, lines, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"sft": write([*lines, BROKEN])}))
    command = ["inspect", "--config", str(file), "--num", "1"]
    assert main([*command, "--rows", "10"]) == 0
    assert "only the first 10 rows are read" in capsys.readouterr().out
    assert main([*command, "--rows=all"]) == 2
    assert "line 13, column 2: broken JSON" in capsys.readouterr().err
    assert main([*command, "--rows", "0"]) == 2
    assert "rows: must be at least 1, or all; got 0" in capsys.readouterr().err
    assert main([*command, "--rows", "many"]) == 2
    assert "--rows: 'many' is not a number" in capsys.readouterr().err
