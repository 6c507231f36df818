"""Tests that an interrupted and restarted run ends bit-identical to an uninterrupted one, for every trainer."""

import random
import signal
import sys

import numpy as np
import pytest
import torch

from fastrlhf.algorithms import ppo
from fastrlhf.evaluation import held_out
from fastrlhf.rollout import engine
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.signals import Interrupted
from tests.resumable import KINDS, STEPS, Killed, Watch, left, run, save_models, untimed_log


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return untimed_log(folder, run("sft", paths, folder))


@pytest.fixture(scope="module")
def whole_ppo(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole ppo"
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch("ppo", patch)
        return left(run("ppo", paths, folder, **CUT), watch.made[-1], folder)


def seed_everything() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step_and_restarted_every_trainer_ends_with_the_same_bits(kind, paths, tmp_path, monkeypatch):
    watch = Watch(kind, monkeypatch)
    seed_everything()
    whole = left(run(kind, paths, tmp_path / "whole"), watch.made[-1], tmp_path / "whole")
    assert any(name.endswith("exp_avg") for name in whole["optimizer"])
    for where in ((2, "after"), (4, "before"), (STEPS, "before")):
        folder = tmp_path / f"{where[0]}-{where[1]}"
        seed_everything()
        watch.kill = where
        with pytest.raises(Killed):
            run(kind, paths, folder)
        watch.kill = None
        random.seed(6)
        torch.manual_seed(6)
        np.random.seed(6)
        assert left(run(kind, paths, folder), watch.made[-1], folder) == whole, where


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(paths, tmp_path, monkeypatch, caplog):
    watch = Watch("dpo", monkeypatch)
    whole = left(run("dpo", paths, tmp_path / "whole"), watch.made[-1], tmp_path / "whole")
    watch.kill = (2, "before")
    with pytest.raises(Killed):
        run("dpo", paths, tmp_path / "cut")
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [0, 1]
    watch.kill = None
    assert left(run("dpo", paths, tmp_path / "cut"), watch.made[-1], tmp_path / "cut") == whole
    assert "was stopped without a checkpoint; this one starts again" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_the_step_is_saved_and_the_same_command_continues(number, paths, whole, tmp_path, monkeypatch):
    step_of = torch.optim.AdamW.step
    count = []

    def signalled(optimizer, *arguments):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(number)
        return step_of(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    with pytest.raises(
        Interrupted, match=r"^interrupted in the evaluation after step 3, saved as .*checkpoint-3$"
    ) as stop:
        run("sft", paths, tmp_path / "run")
    assert stop.value.exit_code == 128 + number
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("checkpoint-2", "checkpoint-3", "config.yaml", "metrics.jsonl", "samples.jsonl")
    }
    assert untimed_log(tmp_path / "run", run("sft", paths, tmp_path / "run")) == whole


def test_a_signal_in_the_last_step_is_obeyed_before_its_evaluation_and_else_when_the_model_is_saved(
    paths, whole, tmp_path, monkeypatch
):
    log = Run.log

    def late(run, step, *arguments, **keywords):
        if step == STEPS:
            signal.raise_signal(signal.SIGINT)
        log(run, step, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", late)
        with pytest.raises(Interrupted, match=r"in the evaluation after step 5, saved as .*checkpoint-5$"):
            run("sft", paths, tmp_path / "run")
        folder = tmp_path / "without evaluation"
        with pytest.raises(Interrupted, match=rf"^interrupted after the last step; the trained model is in {folder}$"):
            run("drpo", paths, folder)
    assert (folder / "config.json").exists()
    assert not list(folder.glob(".*"))
    assert untimed_log(tmp_path / "run", run("sft", paths, tmp_path / "run")) == whole


CUT = {"save_steps": 0, "sampler_is_cap": 2.0, "target_kl": 9.0}
MOMENTS = {
    "rollout": (engine, "check_room", 5, "in step 3; step 2 is saved as"),
    "scoring": (ppo, "score_episodes", 3, "in step 3; step 2 is saved as"),
    "update": (Optimizer, "step", 14, "in step 4; step 3 is saved as"),
    "evaluation": (held_out, "describe", 3, "in the evaluation after step 3, saved as"),
}
"""Part of an on-policy step -> (module or class of a function, name of the function, number of the call at which a
signal comes, end of the message)."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_in_any_part_of_an_on_policy_step_loses_no_whole_step_and_changes_no_bit(
    moment, paths, whole_ppo, tmp_path, monkeypatch
):
    """Signals the run in each part of a step; the resumed run must give the results of an uninterrupted run. A signal
    during the update stops the update between two mini-batches, after weights have changed. The resumed run then trains
    on the remaining mini-batches of the saved experience.
    """
    place, name, at, said = MOMENTS[moment]
    watch, function, calls = Watch("ppo", monkeypatch), getattr(place, name), []

    def signalled(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, signalled)
        with pytest.raises(Interrupted, match=f"^interrupted {said} .*checkpoint-[23]$"):
            run("ppo", paths, tmp_path / "cut", **CUT)
    assert left(run("ppo", paths, tmp_path / "cut", **CUT), watch.made[-1], tmp_path / "cut") == whole_ppo


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_at_a_random_moment_loses_no_whole_step_and_changes_no_bit(kind, paths, tmp_path, monkeypatch):
    """Sends the signal at a random call of a Python function between the start and the end of the run."""
    draw, watch, count = random.Random(kind), Watch(kind, monkeypatch), [0, -1]
    enter, leave = Run.__enter__, Run.__exit__

    def look(frame, event, argument):
        count[0] += event == "call"
        if count[0] == count[1]:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGTERM)

    def entered(run):
        enter(run)
        count[0] = 0
        sys.setprofile(look)
        return run

    def left_by(run, *error):
        sys.setprofile(None)
        leave(run, *error)

    monkeypatch.setattr(Run, "__enter__", entered)
    monkeypatch.setattr(Run, "__exit__", left_by)
    for name in ("first", "whole"):  # Only the second count can be repeated: the first run also imports modules.
        seed_everything()
        result = run(kind, paths, tmp_path / name, save_steps=0)
    whole = left(result, watch.made[-1], tmp_path / "whole")
    moments = [draw.randrange(count[0]) for _ in range(8)]
    for moment in moments:
        folder, count[1] = tmp_path / str(moment), moment
        seed_everything()
        with pytest.raises(Interrupted) as stop:
            run(kind, paths, folder, save_steps=0)
        count[1] = -1
        if not stop.value.finished:
            if "nothing is saved" in str(stop.value):
                seed_everything()
            assert left(run(kind, paths, folder, save_steps=0), watch.made[-1], folder) == whole, moment
