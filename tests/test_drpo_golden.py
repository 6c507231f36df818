"""Compares an update of DR-PO (`compat: reference`) with numbers of the authors' code, recorded by
tests/golden/record_drpo.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.algorithms import ppo
from fastrlhf.config import DRPOConfig
from fastrlhf.types import Example, Prefix, Rollout
from tests import tiny
from tests.golden import record_drpo as recorded
from tests.golden import record_trl as shared
from tests.test_trl_golden import assert_same_gradients

GOLDEN = json.loads(recorded.FILE.read_text(encoding="utf-8"))
TOLERANCE = 1e-5


def replay(config, policy, eos_token_id):
    """Returns an engine that returns the recorded rollouts, and sets the policy's weights to the recorded ones. A run
    copies its reference before it makes an engine, so the reference stays unchanged."""
    shared.with_formula_weights(policy, shared.POLICY)

    def rollout(prefix):
        prompt, response, copied = recorded.ROLLOUTS[prefix.row]
        start = Prefix(
            token_ids=[*prompt, *response[:copied]], num_reset=copied, row=prefix.row, episode=prefix.episode
        )
        sampled = response[copied:]
        logprobs = GOLDEN["logprobs"][prefix.row][copied:]
        return Rollout(prefix=start, completion=sampled, sampler_logprob=logprobs, ended=tiny.EOS in sampled)

    return SimpleNamespace(generate=lambda prefixes: [rollout(prefix) for prefix in prefixes])


def test_rewards_advantages_losses_and_gradients_are_the_authors(tmp_path, monkeypatch):
    models = {"reference": shared.causal_lm(shared.REFERENCE), "reward": shared.reward_model()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    made = tiny.record_gradients(monkeypatch, ppo, recorded.LEARNING_RATE)
    seen = tiny.record_experience(monkeypatch)
    config = DRPOConfig(
        model_name_or_path=str(tmp_path / "reference"),
        reward_model_path=str(tmp_path / "reward"),
        compat="reference",
        per_device_train_batch_size=len(recorded.ROLLOUTS),
        max_steps=1,
        num_ppo_epochs=recorded.NUM_EPOCHS,
        response_length=recorded.RESPONSE_LENGTH,
        temperature=recorded.TEMPERATURE,
        missing_eos_score=recorded.PENALTY,
        kl_coef=recorded.KL_COEF,
        gamma=recorded.GAMMA,
        lam=recorded.LAM,
        cliprange=recorded.CLIP,
        cliprange_value=recorded.CLIP_VALUE,
        vf_coef=recorded.VF_COEF,
        max_length=32,
        micro_batch_tokens=256,
        progress=False,
    )
    words = tiny.tokenizer().convert_ids_to_tokens
    rows = [
        Example(prompt=" ".join(words(prompt)), reference="w1 w2", row=row)  # the engine chooses the resets
        for row, (prompt, *_) in enumerate(recorded.ROLLOUTS)
    ]
    result = ppo.train_ppo(config, rows, engine=replay)

    [(ours, order)] = seen
    for name, theirs in (("value", "values"), ("advantage", "advantages"), ("returns", "returns")):
        expected = torch.tensor([GOLDEN[theirs][row] for row in order])
        found = getattr(ours, name).view(len(order), -1)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(made[0].steps) == len(GOLDEN["steps"]) == recorded.NUM_EPOCHS
    for step, golden in zip(made[0].steps, GOLDEN["steps"], strict=True):
        assert_same_gradients(result.model, step[0], golden["policy"])
        assert_same_gradients(result.value_model, step[1], golden["critic"])
    for name in ("policy", "value"):
        mean = sum(golden["loss"][name] for golden in GOLDEN["steps"]) / recorded.NUM_EPOCHS
        assert result.history[0][f"loss/{name}_avg"] == pytest.approx(mean, rel=TOLERANCE)
