"""What a run leaves behind, whether it ends well or not."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import PPOConfig, SFTConfig
from fastrlhf.models.loading import load_policy
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.runtime.run import Run, StepMetrics, check_micro_batch
from fastrlhf.types import TokenizedExample
from fastrlhf_kernels import Max, Sum
from tests import resumable, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return tiny.save_reward_model(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return resumable.save_models(tmp_path_factory.mktemp("models"))


def config(model, folder: Path | str, **settings):
    fields = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "progress": False}
    return SFTConfig(model_name_or_path=model, output_dir=str(folder), **fields | settings)


def ppo_config(model, judge, folder):
    return PPOConfig(
        model_name_or_path=model,
        reward_model_path=judge,
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        response_length=5,
        max_length=32,
        num_ppo_epochs=1,
        progress=False,
    )


def test_a_run_leaves_its_configuration_its_metrics_and_a_model_that_anyone_can_load(model, tmp_path):
    folder = tmp_path / "deep" / "run"
    result = train_sft(config(model, folder), tiny.examples(8), tiny.examples(4, seed=1))
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "config.json", "model.safetensors"} <= left
    assert not [name for name in left if name.startswith(".")]
    assert result.output_dir == folder
    assert result.value_model is None
    assert [row | {"step": i, "time": 0} for i, row in enumerate(result.history, 1)] == [
        row | {"time": 0} for row in read_metrics(folder / "metrics.jsonl")
    ]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    assert tokenizer.eos_token_id == tiny.EOS
    assert tokenizer("w0 w1")["input_ids"] == [3, 4]


def test_an_on_policy_run_leaves_its_critic_too(model, judge, tmp_path):
    result = train_ppo(ppo_config(model, judge, tmp_path / "run"), tiny.examples(8))
    assert result.value_model is not None
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value_model")
    assert torch.equal(critic.score.weight, result.value_model.score.weight)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    assert set(samples[0]) == {"step", "row", "prompt", "reset", "response", "score", "tokens", "rewards"}


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "groups", "ppo", "rto"])
def test_the_evaluation_on_start_is_row_0_of_the_log_and_of_what_the_last_one_measures(models, tmp_path, kind):
    result = resumable.run(kind, models, tmp_path / "run", max_steps=1, save_steps=0, eval_on_start=True)
    first, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first.pop("step"), last["step"]) == (0, 1)
    assert {**first, "time": 0} == {**result.initial, "time": 0}
    assert result.initial.keys() == result.final.keys()
    assert result.initial != result.final
    assert len(result.history) == 1
    if kind == "dpo":
        assert result.initial["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    if kind in ("ppo", "rto"):
        assert result.initial["eval_objective/kl"] == 0 != result.final["eval_objective/kl"]


def test_without_an_output_dir_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train_sft(config(model, ""), tiny.examples(8))
    assert result.output_dir is None
    assert len(result.history) == 3
    assert list(tmp_path.iterdir()) == []


def test_each_row_is_on_disk_before_the_next_step(tmp_path):
    with Run("sft", config("", tmp_path / "run"), 2) as run:
        for step in (1, 2):
            run.log(step, {"loss": 1.0 / step})
            assert [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1.0, 0.5][:step]
    assert run.history == [{"loss": 1.0}, {"loss": 0.5}]


def test_the_rows_are_on_the_disk_before_the_checkpoint_that_needs_them(model, tmp_path, monkeypatch):
    events, flush, rename = [], os.fsync, os.rename

    def flushed(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def renamed(source, target):
        events.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    with Run("sft", config(model, tmp_path / "run", save_steps=1), 2, (load_policy(model), tiny.tokenizer())) as run:
        run.log(1, {"loss": 1.0})
    assert {"metrics.jsonl", "samples.jsonl"} <= {*events[: events.index("checkpoint-1")]}


def test_a_run_that_fails_in_the_middle_leaves_its_metrics_and_the_weights_of_its_last_whole_step(
    model, judge, tmp_path
):
    calls = []

    def breaks_at_the_second_update(rollouts):
        calls.append(len(rollouts))
        return torch.full((len(rollouts),), 1.0 if len(calls) == 1 else float("nan"))

    cfg = ppo_config(model, judge, tmp_path / "run")
    with pytest.raises(ValueError, match=r"the score of a response to row .* is nan"):
        train_ppo(cfg, tiny.examples(8), judge=breaks_at_the_second_update)
    left = {"config.yaml", "metrics.jsonl", "samples.jsonl", "interrupted"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == left
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "interrupted")
    unmoved = [torch.equal(a, b) for a, b in zip(saved.parameters(), load_policy(model).parameters(), strict=True)]
    assert not any(unmoved)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    with pytest.raises(ValueError, match=r"output_dir: .* already holds a run that failed before its first checkpoint"):
        train_ppo(cfg, tiny.examples(8))


class FakeTensorBoard:
    def __init__(self, folder):
        if "broken" in folder:
            raise RuntimeError("no server")

    def add_text(self, *_): ...

    def add_scalar(self, *_): ...

    def close(self): ...


def test_a_reporter_that_fails_to_start_leaves_a_folder_that_can_be_used_again(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeTensorBoard))
    cfg = config("", tmp_path / "broken", report_to=("tensorboard",))
    with pytest.raises(RuntimeError, match="no server"), Run("sft", cfg, 1):
        pass
    with Run("sft", config("", tmp_path / "broken"), 1) as run:
        run.log(1, {"loss": 1.0})


def test_a_reporter_is_told_whether_the_run_failed(monkeypatch, tmp_path):
    ends = []
    run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda exit_code: ends.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    with Run("sft", config("", tmp_path / "good", report_to=("wandb",)), 1):
        pass
    failing = Run("sft", config("", tmp_path / "bad", report_to=("wandb",)), 1)
    with pytest.raises(KeyError), failing:
        raise KeyError
    assert ends == [0, 1]


def test_evaluation_is_due_at_the_last_step_and_every_so_often():
    run = Run("sft", config("", ""), 7)
    assert [step for step in range(7) if run.due(step, 0)] == [6]
    assert [step for step in range(7) if run.due(step, 3)] == [2, 5, 6]


def test_sums_are_divided_by_the_count_and_maxima_are_kept():
    totals = StepMetrics()
    totals.add({"loss": Sum(torch.tensor(3.0)), "pairs": Sum(torch.tensor(1.0)), "top": Max(torch.tensor(0.5))})
    totals.add({"loss": Sum(torch.tensor(5.0)), "pairs": Sum(torch.tensor(3.0)), "top": Max(torch.tensor(0.25))})
    assert totals.means("pairs") == {"loss": 2.0, "pairs": 1.0, "top": 0.5}


def test_the_row_that_no_micro_batch_can_hold_is_named():
    examples = [TokenizedExample(prompt=[1], row=row) for row in (3, 8)]
    check_micro_batch(config("", "", micro_batch_tokens=9), examples, [5, 9])
    with pytest.raises(ValueError, match=r"micro_batch_tokens: must be at least 9, the tokens of row 8, .*; got 8"):
        check_micro_batch(config("", "", micro_batch_tokens=8), examples, [5, 9])


def test_weights_that_a_checkpoint_has_are_not_saved_a_second_time(model, tmp_path):
    for save_steps, expected in ((1, False), (0, True)):
        cfg = config(model, tmp_path / f"every-{save_steps}", save_steps=save_steps)
        loaded, tokenizer = load_policy(model), tiny.tokenizer()
        run = Run("sft", cfg, 3, (loaded, tokenizer))
        with pytest.raises(ZeroDivisionError) as stop, run:  # noqa: PT012
            run.log(1, {"loss": 1.0})
            _ = 1 / 0
        whole = [f"its last weights are in {tmp_path / 'every-0' / 'interrupted'}"]  # of which no more is to be said
        assert getattr(stop.value, "__notes__", []) == (whole if expected else [])
        assert (tmp_path / f"every-{save_steps}" / "interrupted").exists() == expected


def test_after_the_last_step_there_is_no_checkpoint_but_the_model(model, tmp_path):
    train_sft(config(model, tmp_path / "run", save_steps=1), tiny.examples(8))
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert (tmp_path / "run" / "config.json").exists()
