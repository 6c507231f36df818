"""Tests of what a run leaves in its folder, after success and after errors."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import PPOConfig, SFTConfig
from fastrlhf.data.packing import check_micro_batch
from fastrlhf.models.loading import load_policy
from fastrlhf.runtime import merging
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.signals import Interrupted
from fastrlhf.types import TokenizedExample
from tests import resumable, tiny
from tests.resumable import untimed


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


def test_a_run_writes_its_configuration_its_metrics_and_a_loadable_model(model, tmp_path):
    folder = tmp_path / "deep" / "run"
    result = train_sft(config(model, folder), tiny.examples(8), tiny.examples(4, seed=1))
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "config.json", "model.safetensors"} <= left
    assert not [name for name in left if name.startswith(".")]
    assert result.output_dir == folder
    assert result.value_model is None
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row | {"step": i} for i, row in enumerate(result.history, 1)] == [untimed(row) for row in rows]
    assert all(row["system/tokens_per_second"] > 0 and row["system/cpu_memory_gib"] > 0 for row in rows)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    assert tokenizer.eos_token_id == tiny.EOS
    assert tokenizer("w0 w1")["input_ids"] == [3, 4]


def test_an_on_policy_run_also_saves_its_critic(model, judge, tmp_path):
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


class Judge:
    """A stand-in for a reward model that scores responses by length. Call number `at` returns `what(rollouts)`
    instead."""

    def __init__(self, at: int, what):
        self.calls, self.at, self.what = 0, at, what

    def __call__(self, rollouts):
        self.calls += 1
        if self.calls == self.at:
            return self.what(rollouts)
        return torch.tensor([float(len(rollout.completion)) for rollout in rollouts])


def unavailable(rollouts):
    raise ConnectionError("503")


def leave(rollouts):
    sys.exit(0)


def nan(rollouts):
    return torch.full((len(rollouts),), float("nan"))


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (unavailable, ConnectionError, "503"),
        (leave, RuntimeError, r"a function that the run calls has called sys.exit\(0\)"),
        (nan, ValueError, r"the score of a response to row .* is nan"),
    ],
)
def test_after_an_error_of_any_kind_the_last_whole_step_is_saved_and_the_same_command_continues(
    what, kind, message, model, judge, tmp_path
):
    whole, cut = (replace(ppo_config(model, judge, tmp_path / name), max_steps=3) for name in ("whole", "cut"))
    train_ppo(whole, tiny.examples(8), judge=Judge(0, None))
    with pytest.raises(kind, match=message) as stop:
        train_ppo(cut, tiny.examples(8), judge=Judge(2, what))
    assert stop.value.__notes__ == [f"saved as {tmp_path / 'cut' / 'checkpoint-1'}; the same command continues"]
    left = {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoint-1"}
    assert {path.name for path in (tmp_path / "cut").iterdir()} == left
    result = train_ppo(cut, tiny.examples(8), judge=Judge(0, None))
    assert resumable.untimed_log(tmp_path / "cut", result) == resumable.untimed_log(tmp_path / "whole")


def test_an_error_after_the_last_step_loses_nothing_either(model, tmp_path, monkeypatch):
    """If the final model cannot be saved, the run saves its last step as a checkpoint. Repeating the command then saves
    the model."""
    whole = train_sft(config(model, tmp_path / "whole"), tiny.examples(8), tiny.examples(4, seed=1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no luck") as stop:  # noqa: PT012
        patch.setattr(merging, "save_model", raiser(OSError("no luck")))
        train_sft(config(model, tmp_path / "cut"), tiny.examples(8), tiny.examples(4, seed=1))
    assert stop.value.__notes__ == [f"saved as {tmp_path / 'cut' / 'checkpoint-3'}; the same command continues"]
    again = train_sft(config(model, tmp_path / "cut"), tiny.examples(8), tiny.examples(4, seed=1))
    assert resumable.untimed_log(tmp_path / "cut", again) == resumable.untimed_log(tmp_path / "whole", whole)
    assert again.final == whole.final != {}


def raiser(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


def test_a_stop_request_takes_effect_between_rollout_and_update(model, judge, tmp_path):
    def signalled(rollouts):
        signal.raise_signal(signal.SIGTERM)
        return Judge(0, None)(rollouts)

    whole, cut, first = (ppo_config(model, judge, tmp_path / name) for name in ("whole", "cut", "first"))
    train_ppo(whole, tiny.examples(8), judge=Judge(0, None))
    with pytest.raises(Interrupted, match=r"^interrupted in step 2; step 1 is saved as .*point-1$"):
        train_ppo(cut, tiny.examples(8), judge=Judge(2, signalled))
    train_ppo(cut, tiny.examples(8), judge=Judge(0, None))
    assert resumable.untimed_log(tmp_path / "cut") == resumable.untimed_log(tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"^interrupted before the first step was complete; nothing is saved$"):
        train_ppo(first, tiny.examples(8), judge=Judge(1, signalled))
    assert not list((tmp_path / "first").glob("checkpoint-*"))


def test_a_run_whose_reward_file_has_changed_is_refused_unless_allowed(model, judge, tmp_path, monkeypatch):
    file = tmp_path / "reward.py"
    file.write_text("def short(rollout):\n    return -len(rollout.completion)\n")
    cfg = replace(ppo_config(model, judge, tmp_path / "run"), **{"reward_functions": (f"{file}:short",)})
    with pytest.raises(ConnectionError):
        train_ppo(cfg, tiny.examples(8), judge=Judge(2, unavailable))
    file.write_text(file.read_text().replace("-len", "+len"))
    told = rf"^output_dir: the file of '{file}:short' has changed since .*checkpoint-1' was saved; restore the old file"
    with pytest.raises(ValueError, match=told):
        train_ppo(cfg, tiny.examples(8), judge=Judge(0, None))
    monkeypatch.chdir(tmp_path / "run")  # names the file of the first run by a different path
    elsewhere = replace(cfg, reward_functions=("../reward.py:short",))
    with pytest.raises(ValueError, match=told):
        train_ppo(elsewhere, tiny.examples(8), judge=Judge(0, None))
    train_ppo(replace(elsewhere, resume_changed_functions=True), tiny.examples(8), judge=Judge(0, None))


def test_a_reward_that_a_program_holds_and_has_changed_is_not_continued_with_in_silence(model, judge, tmp_path):
    def short(rollout):
        return -len(rollout.completion)

    def long(rollout):
        return +len(rollout.completion)

    cfg = ppo_config(model, judge, tmp_path / "run")
    with pytest.raises(ConnectionError):
        train_ppo(cfg, tiny.examples(8), judge=Judge(2, unavailable), reward_functions={"size": short})
    with pytest.raises(ValueError, match=r"^output_dir: the file of 'size' has changed since .*checkpoint-1' was"):
        train_ppo(cfg, tiny.examples(8), judge=Judge(0, None), reward_functions={"size": long})
    train_ppo(cfg, tiny.examples(8), judge=Judge(0, None), reward_functions={"size": short})


def test_a_function_that_changes_the_directory_does_not_split_the_run(model, judge, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def moved(rollouts):
        os.chdir(tmp_path / "elsewhere")
        return Judge(0, None)(rollouts)

    result = train_ppo(ppo_config(model, judge, "run"), tiny.examples(8), judge=Judge(1, moved))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert {"config.yaml", "metrics.jsonl", "config.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert result.output_dir == tmp_path / "run"


def test_relative_paths_are_resolved_before_the_directory_changes(model, judge, tmp_path, monkeypatch):
    """Uses a reward function that changes the working directory at its first call, before any model is opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name, source in (("policy", model), ("judge", judge)):
        (tmp_path / name).symlink_to(source)
    source = "import os\n\ndef away(rollout):\n    os.chdir('elsewhere' if os.path.isdir('elsewhere') else '.')\n"
    (tmp_path / "away.py").write_text(f"{source}    return 1.0\n")
    keys = {"reward_functions": ("away.py:away",), "reward_model_path": "judge", "save_steps": 1}
    cfg = replace(ppo_config("policy", judge, "run"), **keys)
    train_ppo(cfg, tiny.examples(8))
    assert Path.cwd() == tmp_path / "elsewhere"
    assert list(Path.cwd().iterdir()) == []
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    given = ("run", "policy", "judge", ["away.py:away"])
    keys = ("output_dir", "model_name_or_path", "reward_model_path", "reward_functions")
    assert tuple(written[key] for key in keys) == given
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "state.json").read_text())
    assert [*state["functions"]] == ["away.py:away"]


class FakeTensorBoard:
    def __init__(self, folder, purge_step):
        if "broken" in folder:
            raise RuntimeError("no server")

    def add_text(self, *_): ...

    def add_scalar(self, *_): ...

    def close(self): ...


def test_after_a_reporter_fails_to_start_the_folder_can_be_used_again(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeTensorBoard))
    cfg = config("", tmp_path / "broken", report_to=("tensorboard",))
    with pytest.raises(ValueError, match=r"tensorboard cannot start: RuntimeError\('no server'\)"), Run("sft", cfg, 1):
        pass
    with Run("sft", config("", tmp_path / "broken"), 1) as run:
        run.log(1, {"loss": 1.0})


def test_a_reporter_learns_whether_the_run_failed(monkeypatch, tmp_path):
    ends = []
    run = SimpleNamespace(id="a", log=lambda *_, **__: None, finish=lambda exit_code: ends.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    with Run("sft", config("", tmp_path / "good", report_to=("wandb",)), 1):
        pass
    failing = Run("sft", config("", tmp_path / "bad", report_to=("wandb",)), 1)
    with pytest.raises(KeyError), failing:
        raise KeyError
    assert ends == [0, 1]


def test_evaluation_is_due_every_eval_steps_and_at_the_last_step():
    run = Run("sft", config("", ""), 7)
    assert [step for step in range(7) if run.due(step, 0)] == [6]
    assert [step for step in range(7) if run.due(step, 3)] == [2, 5, 6]


def test_the_row_that_no_micro_batch_can_hold_is_named():
    examples = [TokenizedExample(prompt=[1], row=row) for row in (3, 8)]
    check_micro_batch(config("", "", micro_batch_tokens=9), examples, [5, 9])
    with pytest.raises(ValueError, match=r"micro_batch_tokens: must be at least 9, the tokens of row 8; .*; got 8"):
        check_micro_batch(config("", "", micro_batch_tokens=8), examples, [5, 9])


def test_a_step_that_a_checkpoint_has_is_not_saved_a_second_time(model, tmp_path):
    for save_steps, expected in ((1, False), (0, True)):
        cfg = config(model, tmp_path / f"every-{save_steps}", save_steps=save_steps)
        loaded, tokenizer = load_policy(model), tiny.tokenizer()
        run = Run("sft", cfg, 3, (loaded, tokenizer))
        with pytest.raises(ZeroDivisionError) as stop, run:  # noqa: PT012
            run.log(1, {"loss": 1.0})
            _ = 1 / 0
        place = tmp_path / f"every-{save_steps}" / "checkpoint-1"
        told = f"saved as {place}; the same command continues"
        assert stop.value.__notes__ == [told if expected else f"the same command continues from {place}"]
        assert {path.name for path in place.parent.iterdir() if path.is_dir()} == {"checkpoint-1"}


def test_after_the_last_step_there_is_no_checkpoint_but_the_model(model, tmp_path):
    train_sft(config(model, tmp_path / "run", save_steps=1), tiny.examples(8))
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert (tmp_path / "run" / "config.json").exists()
