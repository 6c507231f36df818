"""Tests of `python -m bench real parity`: result rows, the largest difference, and what happens without TRL."""

import json

import pytest

from bench.real import parity
from bench.real.parity import run_parity


@pytest.fixture
def jobs(monkeypatch):
    """Replaces the runs: our losses are 2 and 1, TRL's differ by 1e-6 and 3e-6."""
    ran = []

    def run_job(job, work, trl=""):
        ran.append((job.task, trl))
        return {"losses": [2 + 1e-6, 1 - 3e-6], "trl": "1.16.0"} if trl else {"losses": [2.0, 1.0]}

    def rows(form, count):
        return [{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * count

    monkeypatch.setattr(parity, "run_job", run_job)
    monkeypatch.setattr(parity, "short_pairs", rows)
    return ran


def test_each_comparison_has_a_row_with_the_largest_difference(jobs, monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "has_trl", lambda python: True)
    table = run_parity("folder", ["sft", "dpo"], ["text"], 2, 1, "their/python", tmp_path).splitlines()
    assert jobs == [("sft", ""), ("sft", "their/python"), ("dpo", ""), ("dpo", "their/python")]
    (file,) = tmp_path.glob("*.jsonl")
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["task"], first["form"], first["steps"], first["rows_per_step"]) == ("sft", "text", 2, 1)
    assert first["max_difference"] == pytest.approx(3e-6, rel=1e-6)
    assert first["max_relative_difference"] == pytest.approx(3e-6 / (1 - 3e-6), rel=1e-6)
    assert first["trl_losses"] == [2 + 1e-6, 1 - 3e-6]
    assert second["task"] == "dpo"
    assert table[2:] == [f"| {t} | text | 1 rows | 2.0000 to 1.0000 | 3.0e-06 |" for t in ("sft", "dpo")]


def test_without_trl_ppo_is_compared_and_the_rest_is_named(jobs, monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "has_trl", lambda python: False)
    monkeypatch.setattr(parity, "compare_ppo", lambda policy, folder: "| ppo |")
    table = run_parity("folder", ["sft", "ppo"], ["chat"], 2, 1, "python", tmp_path)
    assert not jobs
    assert table.endswith("| ppo |\n\nnot compared: sft, because python cannot import trl; pass --trl PYTHON")
