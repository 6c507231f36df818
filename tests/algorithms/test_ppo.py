"""Tests of the on-policy trainer against an independent padded loop, and of the identities between PPO and DR-PO."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.prefixes import draw_prefixes, make_roll_in
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.algorithms.update import update
from fastrlhf.config import DRPOConfig, PPOConfig
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.types import Rollout, TokenizedExample
from tests import tiny


@pytest.fixture
def paths(tmp_path):
    return {
        "model_name_or_path": tiny.save_policy(tmp_path / "sft"),
        "reward_model_path": tiny.save_reward_model(tmp_path / "reward"),
    }


def config(paths, kind=PPOConfig, **settings):
    fields = {
        "per_device_train_batch_size": 12,
        "max_steps": 2,
        "response_length": 7,
        "max_length": 32,
        "learning_rate": 1e-3,
        "temperature": 0.8,
        "missing_eos_penalty": 0.5,
        "missing_eos_score": None,
        "whiten_rewards": False,
        "micro_batch_tokens": 64,
        "adam_epsilon": 1e-8,
        "progress": False,
    }
    return kind(**paths, **fields | settings)


def tokenized(count: int) -> list[TokenizedExample]:
    return [
        TokenizedExample(
            prompt=[3 + (5 * i + j) % 29 for j in range(3 + i % 4)],
            reference=[*(3 + (3 * i + j) % 29 for j in range(1 + i % 5)), tiny.EOS],
            row=i,
        )
        for i in range(count)
    ]


def assert_same_history(a, b):
    untimed = [
        [{k: v for k, v in row.items() if not k.startswith(("timing/", "drpo/", "rto/", "reward/dpo"))} for row in rows]
        for rows in (a.history, b.history)
    ]
    assert untimed[0] == untimed[1]


class GradientRecorder:
    """A replacement of the optimiser that records the gradients of each step and does not change the weights."""

    def __init__(self, *models):
        self.models, self.steps = models, []

    def step(self):
        self.steps.append([[p.grad.clone() for p in model.parameters()] for model in self.models])
        for model in self.models:
            model.zero_grad()
        return {"grad_norm": 0.0, "value_grad_norm": 0.0, "learning_rate": 0.0}


def padded_ppo_gradients(cfg: PPOConfig, policy, reference, critic, rollouts: list[Rollout], scores: torch.Tensor):
    """Gradients of one PPO update, computed with right-padded [N, L] tensors, full logits and loops over tokens."""
    sequences = [[*r.prefix.token_ids, *r.completion] for r in rollouts]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    attention = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    sampled = torch.zeros(len(rollouts), width - 1)  # 1 if the next token was sampled
    for i, r in enumerate(rollouts):
        sampled[i, len(r.prefix.token_ids) - 1 : len(sequences[i]) - 1] = 1

    def logprobs(model):
        logits = model(ids, attention_mask=attention).logits[:, :-1] / cfg.temperature
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    def values():
        hidden = critic.base_model(ids, attention_mask=attention).last_hidden_state
        return (hidden @ critic.score.weight.T)[..., 0]

    with torch.no_grad():
        old, ref, old_values = logprobs(policy), logprobs(reference), values()
        advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
        for i, r in enumerate(rollouts):
            steps = sampled[i].nonzero()[:, 0].tolist()
            rewards = {t: -cfg.kl_coef * (old[i, t] - ref[i, t]) for t in steps}
            goes_on = cfg.truncation == "bootstrap" and not r.ended
            if not goes_on:
                rewards[steps[-1]] = rewards[steps[-1]] + scores[i] - (0.0 if r.ended else cfg.missing_eos_penalty)
            running = torch.tensor(0.0)
            for t in reversed(steps):
                next_value = old_values[i, t + 1] if t < steps[-1] or goes_on else 0.0
                delta = rewards[t] + cfg.gamma * next_value - old_values[i, t]
                running = delta + cfg.gamma * cfg.lam * running
                advantages[i, t], returns[i, t] = running, running + old_values[i, t]
        kept = sampled.bool()
        mean, std = advantages[kept].mean(), advantages[kept].std(correction=0)
        advantages = (advantages - mean) / std

    ratio = (logprobs(policy) - old).exp()
    clipped = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages)
    value, old_values = values()[:, :-1], old_values[:, :-1]
    moved = old_values + (value - old_values).clamp(-cfg.cliprange_value, cfg.cliprange_value)
    value_loss = 0.5 * torch.max((value - returns) ** 2, (moved - returns) ** 2)
    ((policy_loss + cfg.vf_coef * value_loss) * sampled).sum().div(sampled.sum()).backward()
    return [[p.grad.clone() for p in model.parameters()] for model in (policy, critic)]


BOOTSTRAP = {"truncation": "bootstrap", "missing_eos_penalty": None}


@pytest.mark.parametrize("truncation", [{}, BOOTSTRAP])
@pytest.mark.parametrize("kind", [PPOConfig, DRPOConfig])
def test_one_update_equals_an_independent_padded_loop(paths, kind, truncation):
    fields = {"num_ppo_epochs": 1, "reset_prob": 0.0 if kind is PPOConfig else 0.7, "gamma": 0.9, "lam": 0.8}
    cfg = config(paths, kind, **fields | truncation)
    policy = load_policy(cfg.model_name_or_path)
    reference = frozen_copy(tiny.policy(seed=5))
    critic = load_reward_model(cfg.reward_model_path, pad_token_id=0, must_be_trained=True)
    rollouts = make_engine(cfg, policy, tiny.EOS).generate(draw_prefixes(cfg, tokenized(12), 0))
    assert {r.ended for r in rollouts} == {True, False}
    assert (max(r.prefix.num_reset for r in rollouts) > 0) == (kind is DRPOConfig)
    scores = torch.linspace(-1, 2, 12)

    packs = pack_episodes(cfg, rollouts, list(range(12)), policy.device)
    assert len(packs[0]) > 1
    experience, _ = score_episodes(cfg, policy, reference, critic, rollouts, scores, packs, tiny.EOS)
    recorder = GradientRecorder(policy, critic)
    update(cfg, policy, critic, recorder, rollouts, experience, packs, seed=(0, 0))
    expected = padded_ppo_gradients(cfg, policy, reference, critic, rollouts, scores)
    for ours, theirs in zip(recorder.steps[0], expected, strict=True):
        for gradient, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-6 * other.abs().max().item() + 1e-9)


def run(cfg, **settings):
    return train_ppo(replace(cfg, **settings), tiny.examples(40))


@pytest.mark.parametrize(("probability", "truncation"), [(0.0, {}), (1e-300, {}), (1e-300, BOOTSTRAP)])
def test_ppo_is_drpo_with_probability_zero_bit_for_bit(paths, probability, truncation):
    """With reset_prob 1e-300 the trainer loads responses and draws random numbers, but it resets no episode."""
    ppo = run(config(paths, PPOConfig, **truncation))
    drpo = run(config(paths, DRPOConfig, reset_prob=probability, **truncation))
    assert_same_history(ppo, drpo)
    for ours, theirs in ((ppo.model, drpo.model), (ppo.value_model, drpo.value_model)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_reset_draws_do_not_move_the_samples_of_episodes_that_are_not_reset(paths):
    cfg = config(paths, DRPOConfig, reset_prob=0.5)
    policy = load_policy(cfg.model_name_or_path)
    mixed = make_engine(cfg, policy, tiny.EOS).generate(draw_prefixes(cfg, tokenized(30), 0))
    plain_cfg = replace(cfg, reset_prob=0.0)
    plain = make_engine(plain_cfg, policy, tiny.EOS).generate(draw_prefixes(plain_cfg, tokenized(30), 0))
    not_reset = [i for i, r in enumerate(mixed) if r.prefix.num_reset == 0]
    assert 5 < len(not_reset) < 25
    assert all(mixed[i].completion == plain[i].completion for i in not_reset)


def test_the_first_ratio_is_exactly_one(paths):
    result = run(config(paths, max_steps=1, num_ppo_epochs=1))
    assert result.history[0]["val/ratio"] == 1.0
    assert result.history[0]["policy/approxkl_avg"] == 0.0
    assert result.history[0]["objective/kl"] == 0.0


@pytest.mark.parametrize(("placement", "estimator"), [("reward", "exact"), ("loss", "exact"), ("loss", "k3")])
def test_for_every_kl_placement_the_first_ratio_is_exactly_one_and_the_run_learns(paths, placement, estimator):
    cfg = config(paths, num_ppo_epochs=1, kl_placement=placement, kl_estimator=estimator)
    history = run(cfg).history
    assert [row["val/ratio"] for row in history] == [1.0, 1.0]
    assert history[0]["objective/kl"] == 0.0 < history[1]["objective/kl"]


def test_the_coefficient_is_steered_by_the_kl_of_every_update(paths):
    """The KL coefficient that follows from the KL of one update is used in the next update."""
    cfg = config(paths, max_steps=4, kl_target=0.5, kl_horizon=24, micro_batch_tokens=1000)
    history, coef = run(cfg).history, cfg.kl_coef
    for row in history:
        assert row["policy/kl_coef"] == pytest.approx(coef, rel=1e-12)
        assert row["reward/kl"] == pytest.approx(-coef * row["objective/kl"], rel=1e-4)
        coef *= 1 + min(max(row["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 12 / 24
    assert history[1]["policy/kl_coef"] == pytest.approx(0.9 * cfg.kl_coef)  # the first KL is 0
    assert {row["policy/kl_coef"] for row in run(cfg, kl_target=0.0, kl_horizon=10000).history} == {cfg.kl_coef}


def test_the_policy_waits_for_the_critic(paths):
    """Neither the policy nor the KL coefficient changes during the critic's warm-up."""
    result = run(config(paths, max_steps=4, value_warmup_steps=2, kl_target=0.5, kl_horizon=24))
    assert [row["policy/kl_coef"] for row in result.history] == pytest.approx([0.05, 0.05, 0.05, 0.045])
    moved = [row["objective/kl"] != 0 for row in result.history]
    assert moved == [False, False, False, True]  # the policy moves in update 3; updates 1 and 2 train only the critic
    assert ["loss/policy_avg" in row for row in result.history] == [False, False, True, True]
    assert all(row["loss/value_avg"] > 0 for row in result.history)
    with pytest.raises(ValueError, match=r"^value_warmup_steps: must be below the 2 updates of the run"):
        run(config(paths, max_steps=2, value_warmup_steps=2))


def test_the_critic_has_its_own_learning_rate(paths):
    """Adam's first step moves every weight that has a gradient by the learning rate."""
    cfg = config(paths, max_steps=1, num_ppo_epochs=1)
    start = load_reward_model(cfg.reward_model_path, pad_token_id=0)
    usual, fast = run(cfg), run(cfg, value_learning_rate=5e-3)
    for result, rate in ((usual, 1e-3), (fast, 5e-3)):
        pairs = zip(result.value_model.parameters(), start.parameters(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) == pytest.approx(rate, rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(usual.model.parameters(), fast.model.parameters(), strict=True))


def prefixes_of(cfg):
    """Runs a configuration; returns the prefixes [updates][episodes] from which the episodes started, and the run's
    result."""
    seen = []

    def engine(cfg, policy, eos):
        inner = make_engine(cfg, policy, eos)

        def generate(prefixes):
            seen.append(list(prefixes))
            return inner.generate(prefixes)

        return SimpleNamespace(generate=generate)

    return seen, train_ppo(cfg, tiny.examples(40), engine=engine)


def test_the_curriculum_follows_the_updates_of_the_run(paths):
    """In the first update every reset copies all tokens of a response except the last. In the third update the number
    of copied tokens varies."""
    seen, _ = prefixes_of(config(paths, DRPOConfig, max_steps=3, reset_curriculum=0.5))
    missing = [{round(p.num_reset / p.reset_depth) - p.num_reset for p in prefixes if p.num_reset} for prefixes in seen]
    assert missing[0] == {1}
    assert len(missing[2]) > 2


def test_reset_responses_come_from_the_reference_even_after_the_policy_has_changed(paths):
    cfg = config(paths, DRPOConfig, reset_source="sample", learning_rate=1e-2)
    [_, second], result = prefixes_of(cfg)
    prompts = [TokenizedExample(prompt=p.token_ids[: len(p.token_ids) - p.num_reset], row=p.row) for p in second]
    reference = load_policy(cfg.model_name_or_path)
    drawn = [draw_prefixes(cfg, prompts, 12, roll_in=make_roll_in(cfg, m, tiny.EOS)) for m in (reference, result.model)]
    assert drawn[0] == second != drawn[1]


class BiasedEngine:
    """Samples like the trainer's own engine, but reports log-probs with errors of +0.3 and -0.3 nats."""

    def __init__(self, cfg, policy, eos):
        self.engine = make_engine(cfg, policy, eos)

    def generate(self, prefixes):
        return [
            replace(r, sampler_logprob=[x + 0.3 * (-1) ** t for t, x in enumerate(r.sampler_logprob)])
            for r in self.engine.generate(prefixes)
        ]


def test_a_disagreeing_engine_is_reported_and_its_tokens_are_weighted(paths):
    cfg = config(paths, max_steps=1, sampler_is_cap=1.2, max_sampling_logp_difference=0.5)
    biased = train_ppo(cfg, tiny.examples(40), engine=BiasedEngine)
    row = biased.history[0]
    assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(0.3, rel=1e-4)
    capped = row["sampling/is_weight_capped"]  # the odd tokens have weight exp(0.3), the even tokens exp(-0.3)
    assert 0.2 < capped < 0.5
    assert row["sampling/is_weight_mean"] == pytest.approx(1.2 * capped + math.exp(-0.3) * (1 - capped), rel=1e-4)
    honest = run(cfg)
    assert honest.history[0]["sampling/is_weight_mean"] == pytest.approx(1.0, abs=1e-5)
    ignored = train_ppo(replace(cfg, sampler_is_cap=None), tiny.examples(40), engine=BiasedEngine)
    plain = run(replace(cfg, sampler_is_cap=None))
    pairs = zip(ignored.model.parameters(), plain.model.parameters(), strict=True)
    # Without sampler_is_cap the loss does not use the engine's log-probs; they are only logged
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(biased.model.parameters()), next(plain.model.parameters()))


def test_micro_batches_change_no_update(paths):
    whole = run(config(paths, PPOConfig, micro_batch_tokens=10_000, num_ppo_epochs=2))
    split = run(config(paths, PPOConfig, micro_batch_tokens=24, num_ppo_epochs=2))
    for a, b in zip(whole.history, split.history, strict=True):
        for name in ("objective/scores", "loss/policy_avg", "loss/value_avg", "grad_norm", "value_grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name


def test_a_reset_prefix_gets_no_gradient_and_no_reward(paths):
    cfg = config(paths, DRPOConfig, reset_prob=1.0)
    policy = load_policy(cfg.model_name_or_path)
    rollouts = make_engine(cfg, policy, tiny.EOS).generate(draw_prefixes(cfg, tokenized(12), 0))
    [minibatch] = pack_episodes(cfg, rollouts, list(range(12)), policy.device)
    assert sum(item.batch.num_rows for item in minibatch) == sum(len(r.completion) for r in rollouts)


def test_a_score_that_is_not_finite_ends_the_run_before_it_trains(paths):
    def broken(rollouts):
        return torch.tensor([0.0, float("nan")] + [0.0] * (len(rollouts) - 2))

    with pytest.raises(ValueError, match=r"the score of a response to row .* is nan"):
        train_ppo(config(paths), tiny.examples(40), judge=broken)


def test_rewards_follow_a_judge_of_the_users(paths):
    def likes_short(rollouts):
        return torch.tensor([-float(len(r.completion)) for r in rollouts])

    cfg = config(paths, max_steps=12, learning_rate=6e-3, per_device_train_batch_size=32, kl_coef=0.0, num_ppo_epochs=2)
    result = train_ppo(cfg, tiny.examples(40), judge=likes_short)
    scores = [row["objective/scores"] for row in result.history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0


def test_compat_reference_samples_past_the_eos_and_ignores_one_in_the_last_slot(paths):
    cfg = config(paths, DRPOConfig, compat="reference", missing_eos_penalty=None, missing_eos_score=-1.0)
    result = run(cfg, max_steps=1)
    history = result.history[0]
    assert history["completions/mean_length"] + history["drpo/prefix_len_mean"] == pytest.approx(cfg.response_length)


def test_missing_reward_model_and_prompts_without_room_are_named(paths):
    with pytest.raises(ValueError, match="reward_model_path: nothing rewards a response"):
        train_ppo(config(paths | {"reward_model_path": ""}), tiny.examples(4))
    with pytest.raises(ValueError, match=r"reward_model_path: .* has no trained score head"):
        train_ppo(config(paths | {"reward_model_path": paths["model_name_or_path"]}), tiny.examples(4))
    with pytest.raises(ValueError, match="max_length: no train prompt leaves room"):
        train_ppo(config(paths, max_length=8), tiny.examples(4))


def test_a_second_reward_model_judges_the_held_out_prompts_and_moves_nothing(paths, tmp_path):
    other = tiny.save_reward_model(tmp_path / "other", seed=11)
    held_out = tiny.examples(6, seed=1)
    cfg = config(paths, eval_steps=1)
    plain = train_ppo(cfg, tiny.examples(40), held_out)
    judged = train_ppo(replace(cfg, eval_reward_model_path=other), tiny.examples(40), held_out)
    rows = [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in plain.history]
    for row, other_row in zip(rows, judged.history, strict=True):
        assert row.items() <= other_row.items()
        assert other_row["eval_held_out/scores"] != other_row["eval_objective/scores"]
        assert other_row["eval_held_out/scores_stderr"] > 0
    same = train_ppo(replace(cfg, eval_reward_model_path=cfg.reward_model_path), tiny.examples(40), held_out)
    assert all(row["eval_held_out/scores"] == row["eval_objective/scores"] for row in same.history)


@pytest.mark.parametrize("field", ["reward_model_path", "eval_reward_model_path"])
def test_a_judge_of_another_tokenizer_gives_the_scores_of_the_text(paths, tmp_path, field):
    """Swaps the ids of two words in both the judge's tokenizer and its embedding, so that the score of a text stays
    unchanged."""
    judge = tiny.save_reward_model(tmp_path / "judge")
    file = tmp_path / "judge" / "tokenizer.json"
    known = json.loads(file.read_text())
    ids = known["model"]["vocab"]
    ids["w3"], ids["w4"] = ids["w4"], ids["w3"]
    file.write_text(json.dumps(known))
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[[6, 7]] = rows[[7, 6]].clone()
    model.save_pretrained(judge)
    same = tiny.save_reward_model(tmp_path / "same")
    name = {"reward_model_path": "objective/scores", "eval_reward_model_path": "eval_held_out/scores"}[field]
    found = [
        train_ppo(config(paths | {field: each}, max_steps=1), tiny.examples(40), tiny.examples(3)).history[0][name]
        for each in (judge, same)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_second_judge_without_held_out_prompts_is_refused_before_anything_is_loaded(paths):
    cfg = config(paths, eval_reward_model_path=paths["reward_model_path"])
    with pytest.raises(ValueError, match=r"^eval_reward_model_path: no rows to judge; give num_eval_examples"):
        run(cfg)
    with pytest.raises(ValueError, match=r"^eval_reward_model_path: 'nowhere' is neither a local folder nor"):
        run(cfg, eval_reward_model_path="nowhere")
