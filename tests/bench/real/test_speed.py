"""Tests of `python -m bench real speed`: the order of the runs, the ratios, and equal samples."""

import json

import pytest

from bench.real import speed
from bench.real.speed import check_losses, run_speed
from tests import tiny


@pytest.fixture
def policy(monkeypatch, tmp_path):
    rows = [{"prompt": e.prompt, "chosen": f" {e.chosen}", "rejected": f" {e.rejected}"} for e in tiny.examples(12)]
    monkeypatch.setattr(speed, "short_pairs", lambda form, count: rows[:count])
    monkeypatch.setattr(speed, "typical_pairs", lambda count: rows[:count])
    return tiny.save_policy(tmp_path / "policy")


def read(folder):
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sampling_gives_the_tokens_of_generate_and_training_needs_trl(policy, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "has_trl", lambda python: False)
    table = run_speed(policy, ["sft"], 1, "python", tmp_path / "out")
    (row,) = read(tmp_path / "out")
    assert (row["task"], row["beside"], row["equal"], row["prompts"]) == ("sampling", "generate", 8, 8)
    assert row["time_ratio"] == pytest.approx(row["seconds"] / row["their_seconds"])
    assert table.endswith("not measured: training, because python cannot import trl; pass --trl PYTHON")


def test_the_sides_run_in_turn_and_ratios_are_taken_within_a_round(policy, monkeypatch, tmp_path):
    sides = []
    times = iter([2, 4, 8, 4, 4, 8])  # ours, TRL 1, TRL 4, twice

    def run_job(job, work, trl=""):
        sides.append(job.settings["per_device_train_batch_size"] if trl else "ours")
        seconds = next(times)
        return {"losses": [2.0], "seconds": [seconds / 2] * 2, "peak_mb": 100.0 * (2 if trl else 1), "trl": "1.16.0"}

    monkeypatch.setattr(speed, "has_trl", lambda python: True)
    monkeypatch.setattr(speed, "run_job", run_job)
    monkeypatch.setattr(speed, "sampling_line", lambda *given: "")
    table = run_speed(policy, ["sft", "ppo"], 2, "python", tmp_path / "out").splitlines()
    assert sides == ["ours", 1, 4] * 2
    first, second = read(tmp_path / "out")
    assert (first["beside"], first["time_ratio"], first["seconds"]) == ("TRL, batches of 1", 0.75, 3)
    assert (second["time_ratio"], second["peak_mb"], second["their_peak_mb"]) == (0.375, 100, 200)
    assert table[-1] == "| sft | TRL, batches of 4 | 0.38 | 0.50 | 3.0, 8.0 | 100, 200 |"


def test_sides_with_different_first_losses_are_refused():
    check_losses({"ours": [{"losses": [2.0]}], "TRL": [{"losses": [2.00001]}]})
    with pytest.raises(RuntimeError, match=r"^TRL: the first loss is 2\.0001, ours is 2$"):
        check_losses({"ours": [{"losses": [2.0]}], "TRL": [{"losses": [2.0001]}]})
