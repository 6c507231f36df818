"""Tests of the rewards of the on-policy trainer (RTO, PsiPO, user-defined functions) and of training without a
critic."""

# ruff: noqa: F811 (the fixture)

import math
from dataclasses import replace

import pytest
import torch

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DRPOConfig, PPOConfig, RTOConfig
from fastrlhf.models.loading import build_policy
from fastrlhf.report.samples import has_token_rewards
from fastrlhf.runtime.metrics import read_rows
from tests import tiny
from tests.algorithms.test_ppo import assert_same_history, config, paths, run  # noqa: F401 (a fixture)


@pytest.mark.parametrize(("kind", "shaping"), [(PPOConfig, "token"), (DRPOConfig, "rs")])
def test_ppo_is_rto_with_scale_zero_bit_for_bit(paths, tmp_path, kind, shaping):
    """Computes the token rewards of a DPO model and scales them by 0, with PPO (all episodes start at prompts) and with
    DR-PO (some start at resets)."""
    dpo = tiny.save_policy(tmp_path / "dpo", seed=1)
    plain = run(config(paths, kind))
    rto = run(config(paths, kind, dpo_model_path=dpo, dpo_reward_scale=0.0, reward_shaping=shaping))
    assert all(row["rto/abs_sum"] == 0 == row["reward/dpo_share"] for row in rto.history)
    unpaid = run(config(paths, kind, dpo_model_path=dpo, reward_shaping="none"))  # the DPO model is not even loaded
    assert all("rto/abs_sum" not in row for row in unpaid.history)
    for other in (rto, unpaid):
        assert_same_history(plain, other)
        for ours, theirs in ((plain.model, other.model), (plain.value_model, other.value_model)):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_rto_moves_the_policy_towards_the_dpo_model_or_away_from_it(paths, tmp_path, scale):
    """Trains on token rewards only. Their mean rises for both signs of the scale (measured: by 0.21 and 0.12)."""
    dpo = tiny.save_policy(tmp_path / "dpo", seed=1)
    cfg = config(paths, RTOConfig, dpo_model_path=dpo, dpo_reward_scale=scale, score_coef=0.0, kl_coef=0.0)
    cfg = replace(cfg, per_device_train_batch_size=32, num_ppo_epochs=3, micro_batch_tokens=1000)
    history = run(cfg, max_steps=8, learning_rate=1e-2, missing_eos_penalty=None).history
    rewards = [row["rto/token_reward_mean"] for row in history]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.06


def test_a_user_defined_function_is_a_separate_reward(paths):
    result = train_ppo(
        config(paths, max_steps=1),
        tiny.examples(40),
        reward_functions={"brevity": lambda rollout: [-1.0] * len(rollout.completion)},
    )
    row = result.history[0]
    assert row["reward/brevity"] == pytest.approx(-row["completions/mean_length"])
    assert 0 < row["reward/brevity_share"] < 1
    assert row["objective/non_score_reward"] == pytest.approx(row["reward/brevity"] + row["reward/kl"])
    assert row["objective/rlhf_reward"] == pytest.approx(
        sum(row[f"reward/{name}"] for name in ("score", "missing_eos", "kl", "brevity")), rel=1e-5
    )


@pytest.mark.parametrize("compat", ["fixed", "reference"])
def test_samples_have_the_rewards_of_their_own_tokens(paths, tmp_path, compat):
    """Compares the logged rewards of samples with the rewards of their tokens, for episodes that start at resets. In
    compat "reference" reset tokens earn rewards too. The reward of a token is its id, so the test detects a shift by
    one row."""
    cfg = config(paths, DRPOConfig, max_steps=1, compat=compat, output_dir=str(tmp_path / "run"))
    train_ppo(cfg, tiny.examples(8), reward_functions={"id": lambda r: [float(i) for i in r.completion]})
    rows = read_rows(tmp_path / "run" / "samples.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert "".join(row["tokens"]) == row["response"]
        ids = tiny.tokenizer().convert_tokens_to_ids(row["response"].split())
        num = ids.index(tiny.EOS) + 1 if tiny.EOS in ids else len(ids)
        assert row["rewards"]["id"] == ids[:num] + [0] * (len(ids) - num)
        assert row["rewards"]["score"][num - 1] != 0
        assert has_token_rewards(row)


def test_rto_without_a_dpo_model_is_refused(paths):
    with pytest.raises(ValueError, match=r"^dpo_model_path: give the DPO model"):
        train_ppo(config(paths, RTOConfig), tiny.examples(4))


def test_a_dpo_model_may_have_a_wider_embedding(paths, tmp_path):
    wide = build_policy(tiny.model_config(), vocab_size=tiny.VOCAB + 8, eos_token_id=tiny.EOS, seed=3)
    wide.save_pretrained(tmp_path / "wide")
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    row = train_ppo(config(paths, RTOConfig, dpo_model_path=str(tmp_path / "wide")), tiny.examples(4)).history[0]
    assert row["reward/dpo"] != 0


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_without_a_critic_the_policy_learns_from_a_judge_only(paths, estimator):
    def likes_short(rollouts):
        return torch.tensor([-float(len(r.completion)) for r in rollouts])

    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"]},
        max_steps=12,
        learning_rate=6e-3,
        per_device_train_batch_size=32,
        kl_coef=0.0,
        num_ppo_epochs=2,
        advantage_estimator=estimator,
        num_generations=4,
    )
    result = train_ppo(cfg, tiny.examples(40), judge=likes_short)
    scores = [row["objective/scores"] for row in result.history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0
    assert result.value_model is None
    assert not {"loss/value_avg", "val/clipfrac_avg", "value_grad_norm"} & set(result.history[0])
    with pytest.raises(
        ValueError, match="reward_model_path: nothing rewards a response; give a reward model, or reward"
    ):
        train_ppo(cfg, tiny.examples(40))


def test_the_policy_learns_from_reward_functions_only(paths, tmp_path):
    """Uses a reward function that checks whether a response starts with the answer of its row, and no reward model;
    once with and once without a critic."""

    def right(completions, answer, **kwargs):
        return [float(text.startswith(word)) for text, word in zip(completions, answer, strict=True)]

    examples = [replace(one, columns={"answer": f"w{one.row % 4}"}) for one in tiny.examples(24)]
    policy = {"model_name_or_path": paths["model_name_or_path"]}
    keys = {"per_device_train_batch_size": 48, "missing_eos_penalty": None, "kl_coef": 0.0, "micro_batch_tokens": 400}
    group = {"advantage_estimator": "grpo", "num_generations": 8}
    for estimator in (group, {"advantage_estimator": "gae", "vf_coef": 0.5}):
        cfg = config(policy, max_steps=8, **keys | {"learning_rate": 1e-2, "response_length": 4} | estimator)
        functions = {"right": right, "short": lambda rollout: -0.01 * len(rollout.completion)}
        result = train_ppo(cfg, examples, examples[:6], reward_functions=functions)
        first, last = result.history[0], result.history[-1]
        for row in (first, last):
            assert row["reward/right"] == pytest.approx(row["rewards/right/mean"])
            assert row["objective/scores"] == pytest.approx(row["reward/right"] + row["reward/short"], abs=1e-6)
        assert last["rewards/right/mean"] > first["rewards/right/mean"] + 0.1
        summed = last["eval_rewards/right/mean"] + last["eval_rewards/short/mean"]
        assert last["eval_objective/scores"] == pytest.approx(summed)
        assert (result.value_model is None) == (estimator is group)


def test_a_critic_starts_from_the_policy_or_from_the_value_model_of_an_earlier_run(paths, tmp_path):
    def brief(completions):
        return [-float(len(text)) for text in completions]

    policy = {"model_name_or_path": paths["model_name_or_path"]}
    cfg = config(policy, output_dir=str(tmp_path / "first"), learning_rate=1e-4, value_learning_rate=1e-2)
    first = train_ppo(cfg, tiny.examples(8), reward_functions={"brief": brief})
    # In the first update every value of the critic is 0
    assert first.history[0]["critic/explained_var"] == pytest.approx(0, abs=1e-6)
    warm = replace(cfg, output_dir="", critic_model_path=str(tmp_path / "first" / "value_model"))
    second = train_ppo(warm, tiny.examples(8), reward_functions={"brief": brief})
    assert abs(second.history[0]["critic/explained_var"]) > 1e-3
    untrained = replace(warm, critic_model_path=paths["model_name_or_path"])
    with pytest.raises(ValueError, match=r"^critic_model_path: .* has no trained score head"):
        train_ppo(untrained, tiny.examples(8), reward_functions={"brief": brief})


def test_a_new_critic_shares_the_weights_under_an_adapter(paths):
    cfg = config({"model_name_or_path": paths["model_name_or_path"]}, use_peft=True, lora_r=2, max_steps=1)
    result = train_ppo(cfg, tiny.examples(8), reward_functions={"brief": lambda rollout: -1.0})
    assert result.value_model is not None
    assert result.history[0]["value_grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"missing_eos_score": -1.0}, "missing_eos_score: must be null without a reward model, whose score it"),
        ({"psi": "identity"}, "psi: must be '' without a reward model, since it would have no effect"),
        ({"score_norm": "running"}, "score_norm: must be 'none' without a reward model, since"),
    ],
)
def test_keys_of_a_score_are_refused_without_a_reward_model(paths, settings, told):
    cfg = config({"model_name_or_path": paths["model_name_or_path"]}, **{"missing_eos_penalty": None} | settings)
    with pytest.raises(ValueError, match=f"^{told}"):
        train_ppo(cfg, tiny.examples(8), reward_functions={"one": lambda rollout: 1.0})


def test_a_reward_function_is_tried_before_a_model_is_loaded(paths, monkeypatch):
    monkeypatch.setattr("fastrlhf.algorithms.ppo.open_roles", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(RuntimeError, match=r"^reward_functions: 'typo' raised KeyError: 'anser'"):
        train_ppo(config(paths), tiny.examples(8), reward_functions={"typo": lambda completions, **rest: rest["anser"]})


def test_without_a_critic_the_reward_model_is_only_the_judge(paths):
    result = run(config(paths, DRPOConfig, advantage_estimator="rloo", num_generations=3))
    with_critic = run(config(paths, DRPOConfig, num_generations=3))
    assert result.history[0]["objective/scores"] == with_critic.history[0]["objective/scores"]
    assert result.value_model is None
    assert with_critic.value_model is not None


@pytest.mark.parametrize("opponents", ["reference", "rollouts"])
def test_psi_makes_the_reward_a_mean_preference_and_leaves_the_evaluation_in_scores(paths, opponents):
    """Compares PsiPO rewards with values computed by hand. The opponents are the responses of the dataset ("reference")
    or the other rollouts of the group ("rollouts"); the judge scores a response by its length."""

    def length(rollouts):
        return torch.tensor([0.5 * len([*r.prefix.token_ids, *r.completion]) for r in rollouts])

    seen = []

    def watch(rollout):
        seen.append(rollout)
        return 0.0

    examples = tiny.examples(8)
    group = 4 if opponents == "rollouts" else 1
    cfg = config(paths, max_steps=1, psi="identity", psi_opponents=opponents, num_generations=group, num_mini_batches=1)
    history = train_ppo(
        cfg, examples, tiny.examples(2, seed=1), judge=length, reward_functions={"watch": watch}
    ).history
    del seen[2 + cfg.batch_size :], seen[:2]  # drops the calls of the evaluation and the trial call
    scores = dict(zip(map(id, seen), length(seen).tolist(), strict=True))
    prompts = {r.prefix.row: len(r.prefix.token_ids) for r in seen}
    expected = []
    for rollout in seen:
        others = [scores[id(r)] for r in seen if r.prefix.row == rollout.prefix.row and r is not rollout]
        if opponents == "reference":
            reference = tiny.ids(examples[rollout.prefix.row].reference)
            others = [0.5 * (prompts[rollout.prefix.row] + len(reference) + 1)]
        own = scores[id(rollout)]
        expected.append(sum(1 / (1 + math.exp(other - own)) for other in others) / len(others))
    assert history[0]["objective/scores"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert history[0]["eval_objective/scores"] > 1  # the judge's score, in the judge's own unit


def test_group_opponents_need_a_group_and_a_psi_function_needs_a_name(paths):
    with pytest.raises(ValueError, match="num_generations: must be at least 2 when psi_opponents is rollouts"):
        config(paths, psi="identity", psi_opponents="rollouts")
    with pytest.raises(ValueError, match=r"^psi: 'logits' is unknown; give identity"):
        train_ppo(config(paths, psi="logits"), tiny.examples(4))
