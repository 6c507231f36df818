"""Runs the recipe grpo_gsm8k on a tiny model and on rows in the format of its dataset."""

import json

from fastrlhf.cli import main
from fastrlhf.runtime.metrics import read_metrics
from tests import tiny


def test_it_runs_on_rows_of_gsm8k_and_logs_every_reward_by_name(tmp_path):
    rows = [{"question": f"w{i} w1 w2", "answer": f"w{i} <<1+{i}={i + 1}>>\n#### {i + 1}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"model_name_or_path": tiny.save_policy(tmp_path / "model"), "output_dir": f"{tmp_path}/run"}
    small |= {"dataset_name": f"{tmp_path}/rows.jsonl", "dataset_config": "", "dataset_test_split": ""}
    small |= {"num_eval_examples": "4", "max_steps": "1", "train_batch_size": "16", "response_length": "6"}
    small |= {"max_length": "64", "dtype": "float32", "device": "cpu", "progress": "false", "warmup_steps": "0"}
    small["chat_template"] = "{% for turn in messages %}{{ turn.role }} {{ turn.content }} {% endfor %}"
    flags = [part for key, value in small.items() for part in (f"--{key}", value)]
    assert main(["grpo", "--config", "grpo_gsm8k", *flags]) == 0
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("math_answer", "hash_format"):
        # The reward is 0, because the tiny vocabulary has no numbers
        assert row[f"rewards/{name}/mean"] == row[f"eval_rewards/{name}/mean"] == 0
    assert row["loss/policy_avg"] == 0
