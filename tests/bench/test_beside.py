"""Tests of timing the ops of another checkout. In the tests this checkout serves as the other checkout."""

import json
from pathlib import Path

import pytest
import torch

from bench.beside import Beside, commit_of
from bench.kernels import run_kernels
from bench.problems import Case
from bench.providers import select

ROOT = Path(__file__).parent.parent.parent
TINY = Case(24, 16, 40)


@pytest.fixture(autouse=True)
def known_commit(monkeypatch):
    monkeypatch.setattr("bench.kernels.commit_of", lambda folder: "abc")


def test_an_op_of_the_other_build_takes_turns_with_ours_and_gets_its_own_row(tmp_path):
    assert not run_kernels(torch.device("cpu"), [TINY], select(torch.device("cpu"), ["sft"], ["ours, one"]), runs=3,
                           folder=tmp_path, beside=ROOT)  # fmt: skip
    (file,) = tmp_path.iterdir()
    rows = {row["provider"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == ["ours, one shot", "ours, one shot, abc"]
    old, new = rows["ours, one shot, abc"], rows["ours, one shot"]
    assert old["runs"] == 3
    assert old["total_ms"] > 0
    assert old["peak_extra_mb"] == pytest.approx(new["peak_extra_mb"], rel=0.01)


def test_an_implementation_that_the_other_build_lacks_is_none():
    with Beside(ROOT, TINY, "sft", "faster still", "float32", "cpu", 1) as step:
        assert step.extra_bytes is None


def test_the_commit_of_a_folder_without_git_is_an_error(tmp_path):
    with pytest.raises(Exception, match="rev-parse"):
        commit_of(tmp_path)
