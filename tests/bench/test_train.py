"""Tests of `python -m bench train sft | dpo | reward`: the compared trainers, the timed steps and the refused
settings."""

import json
import os

import pytest
import torch

from bench.train import compare
from bench.train.compare import Side, check_first_losses, run_train
from bench.train.sides import Run
from fastrlhf.runtime.optim import Optimizer

needs_data = pytest.mark.skipif(
    not os.environ.get("FASTRLHF_DATA"), reason="FASTRLHF_DATA is not a folder with samples"
)
SMALL = {"steps": 1, "rows": 4, "rounds": 1, "device": "cpu"}
OURS = {"sft": ["ours"], "dpo": ["ours", "ours, prompts twice"], "reward": ["ours", "ours, prompts twice"]}


def rows_in(folder):
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@needs_data
@pytest.mark.parametrize(("name", "padding_free"), [("sft", True), ("dpo", False), ("reward", False)])
def test_both_trainers_start_at_the_same_loss_and_write_a_row_per_side(name, padding_free, tmp_path):
    pytest.importorskip("trl")
    table = run_train(name, "tiny", **SMALL, batch_sizes=[1, 2], folder=tmp_path)
    rows = rows_in(tmp_path)
    theirs = ["TRL, batches of 1", "TRL, batches of 2", "TRL, batches of 2, sorted by length"]
    assert [row["provider"] for row in rows] == OURS[name] + theirs + ["TRL, batches of 2, padding-free"] * padding_free
    assert [row["first_loss"] for row in rows] == pytest.approx([rows[0]["first_loss"]] * len(rows), rel=1e-5)
    tokens = [row["tokens_per_second"] * row["seconds"] for row in rows]
    assert tokens == pytest.approx([tokens[0]] * len(rows))
    assert all(f"| {row['provider']} | {row['tokens_per_second']:.0f} |" in table for row in rows)


@needs_data
def test_a_shared_prompt_counts_twice_in_tokens_and_once_in_operations(tmp_path):
    run_train("reward", "tiny", **SMALL, batch_sizes=[], folder=tmp_path)
    shared, twice = rows_in(tmp_path)
    step = Optimizer.step
    assert step.__name__ == "step", "the timing hook was not removed from the optimiser"
    assert shared["tokens_per_second"] * shared["seconds"] == pytest.approx(
        twice["tokens_per_second"] * twice["seconds"]
    )
    assert 0.5 < shared["tflops"] * shared["seconds"] / (twice["tflops"] * twice["seconds"]) < 0.9
    assert shared["mfu"] is None
    assert shared["peak_mb"] is None


def test_sides_that_start_at_different_losses_are_refused():
    check_first_losses({"ours": [7.0, 7.0], "TRL": [7.00006]}, tolerance=1e-5)
    with pytest.raises(RuntimeError, match=r"TRL: the first loss is 7\.0001, ours is 7: the tasks differ"):
        check_first_losses({"ours": [7.0], "TRL": [7.0, 7.0001]}, tolerance=1e-5)


def test_a_side_without_room_is_skipped_and_the_others_run():
    def full() -> Run:
        raise torch.OutOfMemoryError

    fits = Side(run=lambda: Run(seconds=[1.0], losses=[0.7], peak_mb=None), trees=[])
    runs, too_large = compare._in_turn({"small": fits, "large": Side(run=full, trees=[]), "last": fits}, rounds=2)
    assert {name: len(past) for name, past in runs.items()} == {"small": 2, "last": 2}
    assert too_large == ["large"]


def setup_of(name, device):
    task = compare.TASKS[name]
    return compare.Setup(
        task=task, config=task.config(device=device, **task.settings), examples=[], drawn=[],
        shape=compare.MODELS["tiny"], outputs=1,
    )  # fmt: skip


def test_a_gpu_also_times_checkpointing_and_batches_of_one_are_not_sorted():
    names = ["ours", "ours, prompts twice", "ours, layers again", "ours, offloaded", "TRL, batches of 1"]
    assert [*compare._sides(setup_of("dpo", "cuda"), [1])] == names
    assert [*compare._sides(setup_of("dpo", "cpu"), [1])] == names[:2] + names[-1:]


def test_the_seconds_of_a_step_are_the_median_over_rounds(monkeypatch):
    rounds = [Run(seconds=[s, 2.0], losses=[0.7, 0.6, 0.5], peak_mb=None) for s in (1.0, 9.0, 1.5)]
    monkeypatch.setattr(compare, "training_operations", lambda *_, **__: 7e12)
    row = compare._summary(setup_of("reward", "cpu"), rounds, trees=[])
    assert row["seconds"] == 3.5
    assert row["tflops"] == pytest.approx(2.0)
    assert (row["first_loss"], row["last_loss"]) == (0.7, 0.5)


def test_batch_sizes_that_do_not_divide_the_step_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="batch-sizes: 3 must divide the 4 rows of a step"):
        run_train("sft", "tiny", **SMALL, batch_sizes=[2, 3], folder=tmp_path)
