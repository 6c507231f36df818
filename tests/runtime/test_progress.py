import io
import re
import sys

import pytest

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.config import DPOConfig
from fastrlhf.runtime import progress
from fastrlhf.runtime.progress import Progress, watched
from tests import tiny


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train(clock: _Clock, steps: int, **settings) -> None:
    """Simulates steps of 2 seconds and 100 tokens each; step i has loss i."""
    with Progress("sft", steps, **settings) as shown:
        for step in range(settings.get("start", 0) + 1, steps + 1):
            clock.now += 2
            row = {"loss": float(step), "grad_norm": 1.5, "learning_rate": 1e-5 * step, "num_tokens": 100}
            shown.step(step, row | ({"eval_loss": 0.25} if step == 3 else {}))


def test_a_pipe_gets_lines_for_the_first_step_every_few_steps_and_the_last(clock, capsys):
    train(clock, 25)
    assert capsys.readouterr().err.splitlines() == [
        "sft 1/25: loss 1, learning_rate 1e-05, grad_norm 1.5, 50.0 tokens/s, ETA 00:48",
        "sft 3/25: eval_loss 0.25",
        "sft 10/25: loss 6, learning_rate 0.0001, grad_norm 1.5, 50.0 tokens/s, ETA 00:30",
        "sft 20/25: loss 15.5, learning_rate 0.0002, grad_norm 1.5, 50.0 tokens/s, ETA 00:10",
        "sft 25/25: loss 23, learning_rate 0.00025, grad_norm 1.5, 50.0 tokens/s, ETA 00:00",
    ]


def test_a_resumed_run_continues_counting(clock, capsys):
    train(clock, 8, start=5, every=7)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["sft 6/8", "sft 7/8", "sft 8/8"]


def test_without_progress_the_evaluations_are_still_printed(clock, capsys):
    train(clock, 25, shown=False)
    assert capsys.readouterr().err == "sft 3/25: eval_loss 0.25\n"


def test_only_rank_0_prints(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_first", lambda: False)
    train(clock, 25)
    assert list(watched([1, 2], [3, 4], "reference")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_evaluations_above_it(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("ppo", 3) as shown:
        for step in (1, 2, 3):
            shown.step(step, {"objective/scores": 0.5, "eval_objective/kl": 2.0}, "objective/scores")
    written = terminal.getvalue()
    assert "scores 0.5" in written
    assert "ppo 2/3: eval_objective/kl 2\n" in written
    assert "ETA" not in written


def test_a_run_whose_metrics_lack_a_gradient_norm_still_has_its_line(clock, capsys):
    with Progress("ppo", 1) as shown:
        clock.now = 1
        shown.step(1, {"objective/scores": 0.5, "learning_rate": 0.0}, "objective/scores")
    assert capsys.readouterr().err == "ppo 1/1: objective/scores 0.5, learning_rate 0, 0.00 tokens/s, ETA 00:00\n"


def test_a_pass_over_data_reports_its_progress(clock, capsys):
    for _ in watched(["a", "b", "c"], [10, 20, 30], "reference"):
        clock.now += 6
    assert capsys.readouterr().err.splitlines() == [
        "reference: 30 of 60 examples, ETA 00:12",
        "reference: 60 examples in 00:18",
    ]
    assert list(watched(["a"], [1], "")) == ["a"]
    assert capsys.readouterr().err == ""


def test_a_pass_has_a_bar_on_a_terminal(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(watched(["a", "b"], [1, 2], "reference")) == ["a", "b"]
    assert "reference: 100%" in terminal.getvalue()
    assert " in 00:00" not in terminal.getvalue()


@pytest.mark.parametrize("shown", [True, False])
def test_what_dpo_prints_into_a_pipe(tmp_path, capsys, shown):
    config = DPOConfig(
        model_name_or_path=tiny.save_policy(tmp_path / "policy"),
        max_steps=3,
        eval_steps=2,
        per_device_train_batch_size=2,
        progress=shown,
        **({"logging_steps": 2} if shown else {}),
    )
    capsys.readouterr()
    train_dpo(config, tiny.examples(6), tiny.examples(4, seed=1))
    captured = capsys.readouterr()
    lines = [
        re.sub(r"[-\d.]+e?[-\d]* tokens.*|(?<=loss) .*|\d\d:\d\d$", "", line) for line in captured.err.splitlines()
    ]
    steps = ["log-probs of the reference: 10 examples in ", "dpo 1/3: loss", "dpo 2/3: loss", "dpo 3/3: loss"]
    assert captured.out == ""
    assert [line for line in lines if "eval_" in line] == ["dpo 2/3: eval_loss", "dpo 3/3: eval_loss"]
    assert [line for line in lines if "eval_" not in line] == (steps if shown else [])
