"""Tests which models an on-policy run opens and freezes, and which errors it raises before it loads a model."""

import pytest

from fastrlhf.algorithms.roles import check_sources, open_roles
from fastrlhf.config import DRPOConfig, PPOConfig
from tests import tiny


def config(tmp_path, **settings) -> PPOConfig:
    fields = {
        "model_name_or_path": tiny.save_policy(tmp_path / "sft"),
        "reward_model_path": tiny.save_reward_model(tmp_path / "reward"),
        "missing_eos_penalty": 0.5,
        "dtype": "float32",
    }
    return PPOConfig(**fields | settings)


def test_gae_trains_policy_and_critic_and_freezes_the_reference(tmp_path):
    roles = open_roles(config(tmp_path), tiny.tokenizer(), [])
    assert roles.critic is not None
    assert all(p.requires_grad for model in (roles.policy, roles.critic) for p in model.parameters())
    assert not any(p.requires_grad for p in roles.reference.parameters())
    assert roles.score is roles.judge
    assert roles.held_out_judge is roles.roll_in is None


def test_an_estimator_without_a_critic_opens_none(tmp_path):
    cfg = config(tmp_path, advantage_estimator="rloo", num_generations=2)
    assert open_roles(cfg, tiny.tokenizer(), []).critic is None


def test_a_judge_that_is_not_there_is_named_by_its_key(tmp_path):
    cfg = config(tmp_path, reward_model_path="")
    with pytest.raises(
        ValueError, match=r"^reward_model_path: nothing rewards a response; give a reward model, or reward_functions$"
    ):
        check_sources(cfg, judge=None, engine=None)
    cfg = config(tmp_path, eval_reward_model_path=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"^eval_reward_model_path: "):
        check_sources(cfg, judge=None, engine=None)


@pytest.mark.parametrize("functions", [[len], len])
def test_reward_functions_without_names_are_refused(tmp_path, functions):
    told = r"^reward_functions: must map names to functions, for example .*; got a (list|builtin)"
    with pytest.raises(ValueError, match=told):
        check_sources(config(tmp_path), judge=None, engine=None, functions=functions)


def test_drpo_starts_without_a_reward_model_although_it_has_a_default_score_for_a_missing_eos(tmp_path):
    functions = {"length": len}
    check_sources(DRPOConfig(), judge=None, engine=None, functions=functions)
    check_sources(DRPOConfig(missing_eos_score=None), judge=None, engine=None, functions=functions)
    for cfg, value in ((DRPOConfig(missing_eos_score=-2.0), "-2.0"), (PPOConfig(missing_eos_score=-1.0), "-1.0")):
        told = f"^missing_eos_score: must be null without a reward model, .*; got {value}$"
        with pytest.raises(ValueError, match=told):
            check_sources(cfg, judge=None, engine=None, functions=functions)
