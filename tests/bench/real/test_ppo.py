"""Tests of PPO beside the plain loop: they agree, and the comparison shows a changed constant."""

import json

import pytest

from bench.real import ppo
from bench.real.ppo import PlainPPO, compare_ppo
from tests import tiny


@pytest.fixture
def policy(monkeypatch, tmp_path):
    rows = [{"prompt": example.prompt} for example in tiny.examples(8)]
    monkeypatch.setattr(ppo, "short_pairs", lambda form, count: rows[:count])
    return tiny.save_policy(tmp_path / "policy")


def result(policy, folder):
    line = compare_ppo(policy, folder)
    (file,) = folder.glob("*.jsonl")
    return line, json.loads(file.read_text())


def test_trainer_and_loop_agree_in_losses_and_weights(policy, tmp_path):
    line, row = result(policy, tmp_path / "out")
    assert row["max_difference"] < 1e-6
    assert row["losses"] == pytest.approx(row["loop_losses"], abs=1e-6)
    assert len(row["losses"]) == 4
    assert row["weights_moved"] > 1e-3
    assert row["weights_apart"] < 2e-3 * row["weights_moved"]
    assert line.endswith(f"| {row['max_difference']:.1e} |")


def test_another_value_coefficient_in_the_loop_is_seen_in_the_losses(policy, monkeypatch, tmp_path):
    update = PlainPPO.update

    def changed(self, rollouts, scores):
        self.config = self.config.__class__(model_name_or_path=policy, **ppo.SETTINGS | {"lam": 0.8})
        return update(self, rollouts, scores)

    monkeypatch.setattr(PlainPPO, "update", changed)
    assert result(policy, tmp_path / "out")[1]["max_difference"] > 1e-4
