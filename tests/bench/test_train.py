import json
import os

import pytest

from bench.train import run_train


@pytest.mark.skipif(not os.environ.get("FASTRLHF_DATA"), reason="FASTRLHF_DATA names no folder of samples")
def test_both_trainers_start_at_ln_2_and_leave_a_row_each(tmp_path):
    pytest.importorskip("trl")
    table = run_train("tiny", steps=1, batch_sizes=[2], device="cpu", folder=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = ["ours", "ours, prompts twice", "TRL, batches of 2", "TRL, batches of 2, sorted by length"]
    assert [row["provider"] for row in rows] == names
    assert all(row["first_loss"] == pytest.approx(0.6931, abs=1e-4) for row in rows)
    assert all(f"| {row['provider']} | {row['pairs_per_second']:.1f} |" in table for row in rows)
