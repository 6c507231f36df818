"""Tests of commands that run only in a single process."""

import pytest

from fastrlhf.algorithms.rlp import train_rlp
from fastrlhf.config import DemoConfig, EvalConfig, PPOConfig, RewardConfig, RLPConfig
from fastrlhf.demo import run_demo
from fastrlhf.evaluation.evaluate import evaluate_models


def test_commands_for_one_process_refuse_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, call in {
        "rlp": lambda: train_rlp(RLPConfig(), RewardConfig(), PPOConfig()),
        "demo": lambda: run_demo(DemoConfig()),
        "eval": lambda: evaluate_models(EvalConfig()),
    }.items():
        with pytest.raises(ValueError, match=f"WORLD_SIZE: {name} runs in one process; start it without torchrun"):
            call()
