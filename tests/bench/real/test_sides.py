"""Tests of the jobs for our trainer and for TRL's: equal rows in equal order, equal settings, clear failures."""

import json
import sys

import pytest

from bench.real import sides
from bench.real.sides import Job, both_jobs, has_trl, reward_model, run_job
from fastrlhf.runtime.optim import index_batches
from tests import tiny
from tests.data.chat_templates import CHATML


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    path = tiny.save_policy(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return path


def text_rows(count):
    return [{"prompt": f"w{i}", "chosen": f" w{i} w1", "rejected": " w2"} for i in range(count)]


def chat_rows(count):
    def turn(role, text):
        return [{"role": role, "content": text}]

    return [
        {"prompt": turn("user", f"w{i}"), "chosen": turn("assistant", "w1"), "rejected": turn("assistant", "w2")}
        for i in range(count)
    ]


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_trl_gets_our_rows_in_the_order_in_which_our_trainer_draws_them(policy, tmp_path):
    rows = text_rows(4)
    ours, theirs = both_jobs("sft", rows, policy, tmp_path, steps=3, batch=2, trl_batch=1, is_chat=False)
    assert read(ours.rows) == rows
    drawn = [i for batch in index_batches(4, 2, 3, ours.settings["seed"]) for i in batch]
    assert read(theirs.rows) == [{"prompt": f"w{i}", "completion": f" w{i} w1"} for i in drawn]
    assert (theirs.settings["per_device_train_batch_size"], theirs.settings["gradient_accumulation_steps"]) == (1, 2)
    assert ours.settings["per_device_train_batch_size"] == 2
    assert "train_suffix" not in ours.settings
    same = {name for name in ours.settings if ours.settings[name] == theirs.settings.get(name)}
    assert {"max_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm"} <= same


def test_the_newline_after_a_turn_is_trained_on_both_sides_and_scored_on_neither(policy, tmp_path):
    sizes = {"steps": 1, "batch": 1, "trl_batch": 1, "is_chat": True}
    ours, theirs = both_jobs("ipo", chat_rows(1), policy, tmp_path, **sizes)
    assert ours.settings["train_suffix"] is True
    assert (ours.settings["loss_type"], theirs.settings["loss_type"], theirs.trainer) == ("ipo", "ipo", "DPO")
    assert read(theirs.rows) == chat_rows(1)
    ours, theirs = both_jobs("reward", chat_rows(1), policy, tmp_path, **sizes)
    assert "train_suffix" not in ours.settings
    (row,) = read(theirs.rows)
    assert row["chosen"] == "<|im_start|>user\nw0<|im_end|>\n<|im_start|>assistant\nw1<|im_end|>"
    assert theirs.settings["pad_token"] == sides.PAD


def test_the_reward_model_pads_with_another_token_than_the_end_of_turn(policy, monkeypatch, tmp_path):
    monkeypatch.setattr(sides, "PAD", "<unk>")
    folder = reward_model(policy, tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert folder == str(tmp_path / "reward")
    assert config["pad_token_id"] == 2
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_our_side_reports_losses_times_and_memory(policy, tmp_path):
    ours, _ = both_jobs("sft", text_rows(4), policy, tmp_path, steps=3, batch=2, trl_batch=2, is_chat=False)
    result = run_job(ours, tmp_path)
    assert len(result["losses"]) == 3
    assert result["losses"][0] == pytest.approx(result["losses"][1], rel=0.5)
    assert len(result["seconds"]) == 2
    assert 100 < result["peak_mb"] < 5000


def test_a_side_that_fails_is_reported_with_its_last_lines(tmp_path):
    job = Job(task="sft", trainer="SFT", model="nowhere", rows="none", settings={})
    program = tmp_path / "fails"
    program.write_text("#!/bin/sh\necho no rows in $2 >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"trl_side\.py .*: exit code 3\nno rows in .*/job\.json\n$"):
        run_job(job, tmp_path, str(program))


def test_an_interpreter_without_trl_is_recognised(tmp_path):
    assert not has_trl(str(tmp_path / "python"))
    program = tmp_path / "no_trl"
    program.write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    program.chmod(0o755)
    assert not has_trl(str(program))
