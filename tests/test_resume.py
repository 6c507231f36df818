"""A run that was cut off and started again is the run that never was: bit for bit, in every trainer."""

import random
import signal

import numpy as np
import pytest
import torch

from fastrlhf.runtime.metrics import read_metrics
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


def seed_everything() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step_and_started_again_every_trainer_ends_with_the_same_bits(kind, paths, tmp_path, monkeypatch):
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


def test_killed_before_the_first_checkpoint_a_run_starts_again(paths, tmp_path, monkeypatch, caplog):
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
def test_a_signal_ends_the_step_saves_and_the_same_command_goes_on(number, paths, whole, tmp_path, monkeypatch):
    step_of = torch.optim.AdamW.step
    count = []

    def signalled(optimizer, *arguments):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(number)
        return step_of(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    with pytest.raises(Interrupted, match=r"^interrupted after step 3, saved as .*checkpoint-3$") as stop:
        run("sft", paths, tmp_path / "run")
    assert stop.value.exit_code == 128 + number
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("checkpoint-2", "checkpoint-3", "config.yaml", "metrics.jsonl", "samples.jsonl")
    }
    assert untimed_log(tmp_path / "run", run("sft", paths, tmp_path / "run")) == whole


def test_a_signal_in_the_last_step_lets_the_run_finish_and_is_heard_then(paths, whole, tmp_path, monkeypatch):
    log = Run.log

    def late(run, step, metrics):
        if step == STEPS:
            signal.raise_signal(signal.SIGINT)
        log(run, step, metrics)

    monkeypatch.setattr(Run, "log", late)
    with pytest.raises(KeyboardInterrupt):
        run("sft", paths, tmp_path / "run")
    assert untimed_log(tmp_path / "run") == whole
