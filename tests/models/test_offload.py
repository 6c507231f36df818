"""Frozen models wait elsewhere: their weights come back as they were, and no number of a run changes."""

import pytest
import torch

from fastrlhf.algorithms import on_policy
from fastrlhf.config import RTOConfig, SFTConfig
from fastrlhf.models.adapters import add_adapter, frozen_copy
from fastrlhf.models.offload import Waiting
from tests import tiny


class Poisoned(Waiting):
    """Its weights are not to be read where they wait."""

    def _leave(self):
        for weight in self._weights:
            weight.data = torch.full_like(weight, torch.nan)


def weights(*models):
    return [weight.clone() for model in models for weight in model.parameters()]


def test_weights_are_there_when_they_are_asked_for_and_kept_as_they_were():
    reference, judge = (tiny.policy(seed=seed).requires_grad_(False) for seed in (0, 1))
    before = weights(reference, judge)
    for kind in (Waiting, Poisoned):
        waiting = kind([reference, judge, judge], [tiny.policy()], torch.device("cpu"))
        for _ in range(2):
            with waiting.present():
                assert all(map(torch.equal, before, weights(reference, judge)))
            assert all(weight.isnan().all() == (kind is Poisoned) for weight in weights(reference, judge))


def test_what_a_trained_model_shares_stays():
    policy = tiny.policy()
    add_adapter(policy, SFTConfig(use_peft=True), "base")
    Poisoned([frozen_copy(policy)], [policy], torch.device("cpu"))
    assert not any(weight.isnan().any() for weight in weights(policy))


def test_a_run_that_offloads_reads_no_weight_while_it_waits(tmp_path, monkeypatch):
    base = tiny.save_policy(tmp_path / "base")
    fields = {
        "model_name_or_path": base,
        "reward_model_path": tiny.save_reward_model(tmp_path / "judge"),
        "eval_reward_model_path": tiny.save_reward_model(tmp_path / "second", seed=8),
        "dpo_model_path": tiny.save_policy(tmp_path / "dpo", seed=1),
        "dpo_ref_model_path": tiny.save_policy(tmp_path / "dpo_ref", seed=2),
        "reset_prob": 1.0,
        "reset_source": "sample",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "num_ppo_epochs": 2,
        "response_length": 5,
        "learning_rate": 1e-2,
        "progress": False,
    }

    def history(**settings):
        result = on_policy.train_on_policy(RTOConfig(**fields | settings), tiny.examples(8), tiny.examples(3, seed=1))
        return [{name: value for name, value in row.items() if "timing/" not in name} for row in result.history]

    plain = history()
    monkeypatch.setattr(on_policy, "Waiting", Poisoned)
    assert history(ref_reward_offload=True) == plain


def test_pageable_copies_of_all_weights_never_lie_beside_the_pinned_ones(monkeypatch):
    """Without a GPU memory is only told to be pinned: what is asked for, and whether a second copy is made of it."""
    asked, empty_like = [], torch.empty_like

    def unpinned(tensor, *, device, pin_memory):
        asked.append(pin_memory)
        return empty_like(tensor, device=device)

    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pytest.fail("a second copy"))
    model = tiny.policy()
    before = weights(model)
    Waiting([model], [], torch.device("cuda"))
    assert asked == [True] * len(before)
    assert all(map(torch.equal, before, weights(model)))
