"""The on-policy trainer against an independent padded loop, and the identities between PPO and DR-PO."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.on_policy import draw_prefixes, make_engine, train_on_policy, update
from fastrlhf.config import DRPOConfig, PPOConfig, RTOConfig
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.loading import build_policy, load_policy, load_reward_model
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


class GradientRecorder:
    """Stands in for the optimiser: keeps each step's gradients and leaves the weights alone."""

    def __init__(self, *models):
        self.models, self.steps = models, []

    def step(self):
        self.steps.append([[p.grad.clone() for p in model.parameters()] for model in self.models])
        for model in self.models:
            model.zero_grad()
        return {"grad_norm": 0.0, "value_grad_norm": 0.0, "learning_rate": 0.0}


def padded_ppo_gradients(cfg: PPOConfig, policy, reference, critic, rollouts: list[Rollout], scores: torch.Tensor):
    """One PPO update in the textbook way: right-padded [N, L] tensors, full logits, loops over tokens."""
    sequences = [[*r.prefix.token_ids, *r.completion] for r in rollouts]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    attention = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    sampled = torch.zeros(len(rollouts), width - 1)  # 1 where the next token was sampled
    for i, r in enumerate(rollouts):
        sampled[i, len(r.prefix.token_ids) - 1 : len(sequences[i]) - 1] = 1

    def logprobs(model):
        logits = model(ids, attention_mask=attention).logits[:, :-1] / cfg.temperature
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    def values():
        hidden = critic.base_model(ids, attention_mask=attention).last_hidden_state[:, :-1]
        return (hidden @ critic.score.weight.T)[..., 0]

    with torch.no_grad():
        old, ref, old_values = logprobs(policy), logprobs(reference), values()
        advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
        for i, r in enumerate(rollouts):
            steps = sampled[i].nonzero()[:, 0].tolist()
            rewards = {t: -cfg.kl_coef * (old[i, t] - ref[i, t]) for t in steps}
            rewards[steps[-1]] = rewards[steps[-1]] + scores[i] - (0.0 if r.ended else cfg.missing_eos_penalty)
            running = torch.tensor(0.0)
            for t, after in reversed(list(pairwise([*steps, None]))):
                next_value = 0.0 if after is None else old_values[i, after]
                delta = rewards[t] + cfg.gamma * next_value - old_values[i, t]
                running = delta + cfg.gamma * cfg.lam * running
                advantages[i, t], returns[i, t] = running, running + old_values[i, t]
        kept = sampled.bool()
        mean, std = advantages[kept].mean(), advantages[kept].std(correction=0)
        advantages = (advantages - mean) / std

    ratio = (logprobs(policy) - old).exp()
    clipped = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages)
    value = values()
    moved = old_values + (value - old_values).clamp(-cfg.cliprange_value, cfg.cliprange_value)
    value_loss = 0.5 * torch.max((value - returns) ** 2, (moved - returns) ** 2)
    ((policy_loss + cfg.vf_coef * value_loss) * sampled).sum().div(sampled.sum()).backward()
    return [[p.grad.clone() for p in model.parameters()] for model in (policy, critic)]


@pytest.mark.parametrize("kind", [PPOConfig, DRPOConfig])
def test_one_update_equals_an_independent_padded_loop(paths, kind):
    cfg = config(paths, kind, num_ppo_epochs=1, reset_prob=0.0 if kind is PPOConfig else 0.7)
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
    return train_on_policy(replace(cfg, **settings), tiny.examples(40))


@pytest.mark.parametrize("probability", [0.0, 1e-300])
def test_ppo_is_drpo_with_probability_zero_bit_for_bit(paths, probability):
    """1e-300: responses are loaded and coins are thrown, and none comes up."""
    ppo = run(config(paths, PPOConfig))
    drpo = run(config(paths, DRPOConfig, reset_prob=probability))
    assert_same_history(ppo, drpo)
    for ours, theirs in ((ppo.model, drpo.model), (ppo.value_model, drpo.value_model)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "shaping"), [(PPOConfig, "token"), (DRPOConfig, "rs")])
def test_ppo_is_rto_with_scale_zero_bit_for_bit(paths, tmp_path, kind, shaping):
    """The DPO model is loaded and its token rewards are computed; times 0 they move nothing. The same from resets."""
    dpo = tiny.save_policy(tmp_path / "dpo", seed=1)
    plain = run(config(paths, kind))
    rto = run(config(paths, kind, dpo_model_path=dpo, dpo_reward_scale=0.0, reward_shaping=shaping))
    assert all(row["rto/abs_sum"] == 0 == row["reward/dpo_share"] for row in rto.history)
    assert_same_history(plain, rto)
    for ours, theirs in ((plain.model, rto.model), (plain.value_model, rto.value_model)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def assert_same_history(a, b):
    untimed = [
        [{k: v for k, v in row.items() if not k.startswith(("timing/", "drpo/", "rto/", "reward/dpo"))} for row in rows]
        for rows in (a.history, b.history)
    ]
    assert untimed[0] == untimed[1]


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
        train_on_policy(config(paths), tiny.examples(40), judge=broken)


def test_rewards_follow_a_judge_of_the_users(paths):
    def likes_short(rollouts):
        return torch.tensor([-float(len(r.completion)) for r in rollouts])

    cfg = config(paths, max_steps=12, learning_rate=6e-3, per_device_train_batch_size=32, kl_coef=0.0, num_ppo_epochs=2)
    result = train_on_policy(cfg, tiny.examples(40), judge=likes_short)
    scores = [row["objective/scores"] for row in result.history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0


def test_compat_reference_writes_on_past_the_eos_and_counts_one_in_the_last_slot_as_missing(paths):
    cfg = config(paths, DRPOConfig, compat="reference", missing_eos_penalty=None, missing_eos_score=-1.0)
    result = run(cfg, max_steps=1)
    history = result.history[0]
    assert history["completions/mean_length"] + history["drpo/prefix_len_mean"] == pytest.approx(cfg.response_length)


def test_missing_reward_model_and_prompts_without_room_are_named(paths):
    with pytest.raises(ValueError, match="reward_model_path: give the reward model"):
        train_on_policy(config(paths | {"reward_model_path": ""}), tiny.examples(4))
    with pytest.raises(ValueError, match=r"reward_model_path: .* has no trained score head"):
        train_on_policy(config(paths | {"reward_model_path": paths["model_name_or_path"]}), tiny.examples(4))
    with pytest.raises(ValueError, match="max_length: no train prompt leaves room"):
        train_on_policy(config(paths, max_length=8), tiny.examples(4))


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_rto_draws_the_policy_to_the_dpo_model_or_away_from_it(paths, tmp_path, scale):
    """Without a score the token rewards rise, whatever the sign of their scale (measured: by 0.21 and 0.12)."""
    dpo = tiny.save_policy(tmp_path / "dpo", seed=1)
    cfg = config(paths, RTOConfig, dpo_model_path=dpo, dpo_reward_scale=scale, score_coef=0.0, kl_coef=0.0)
    cfg = replace(cfg, per_device_train_batch_size=32, num_ppo_epochs=3, micro_batch_tokens=1000)
    history = run(cfg, max_steps=8, learning_rate=1e-2, missing_eos_penalty=None).history
    rewards = [row["rto/token_reward_mean"] for row in history]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.06


def test_a_function_of_the_users_is_a_reward_of_its_own(paths):
    result = train_on_policy(
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


def test_rto_without_a_dpo_model_is_told_what_it_lacks(paths):
    with pytest.raises(ValueError, match=r"^dpo_model_path: give the DPO model"):
        train_on_policy(config(paths, RTOConfig), tiny.examples(4))


def test_a_dpo_model_of_another_width_of_vocabulary_is_refused(paths, tmp_path):
    wide = build_policy(tiny.model_config(), vocab_size=tiny.VOCAB + 8, eos_token_id=tiny.EOS, seed=0)
    wide.save_pretrained(tmp_path / "wide")
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"^vocabulary mismatch: .*'dpo_model_path': 40"):
        train_on_policy(config(paths, RTOConfig, dpo_model_path=str(tmp_path / "wide")), tiny.examples(4))


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_without_a_critic_the_policy_learns_and_a_judge_alone_suffices(paths, estimator):
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
        reset_group_size=4,
    )
    result = train_on_policy(cfg, tiny.examples(40), judge=likes_short)
    scores = [row["objective/scores"] for row in result.history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0
    assert result.value_model is None
    assert not {"loss/value_avg", "val/clipfrac_avg", "value_grad_norm"} & set(result.history[0])
    with pytest.raises(ValueError, match="reward_model_path: give the reward model"):
        train_on_policy(cfg, tiny.examples(40))


def test_without_a_critic_the_reward_model_is_the_judge_alone(paths):
    result = run(config(paths, DRPOConfig, advantage_estimator="rloo", reset_group_size=3))
    with_critic = run(config(paths, DRPOConfig, reset_group_size=3))
    assert result.history[0]["objective/scores"] == with_critic.history[0]["objective/scores"]
    assert result.value_model is None
    assert with_critic.value_model is not None


def test_a_second_reward_model_judges_the_held_out_prompts_and_moves_nothing(paths, tmp_path):
    other = tiny.save_reward_model(tmp_path / "other", seed=11)
    held_out = tiny.examples(6, seed=1)
    cfg = config(paths, eval_steps=1)
    plain = train_on_policy(cfg, tiny.examples(40), held_out)
    judged = train_on_policy(replace(cfg, eval_reward_model_path=other), tiny.examples(40), held_out)
    rows = [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in plain.history]
    for row, other_row in zip(rows, judged.history, strict=True):
        assert row.items() <= other_row.items()
        assert other_row["eval_held_out/scores"] != other_row["eval_objective/scores"]
        assert other_row["eval_held_out/scores_stderr"] > 0
    same = train_on_policy(replace(cfg, eval_reward_model_path=cfg.reward_model_path), tiny.examples(40), held_out)
    assert all(row["eval_held_out/scores"] == row["eval_objective/scores"] for row in same.history)


def test_a_second_judge_without_held_out_prompts_is_refused_before_anything_is_loaded(paths):
    cfg = config(paths, eval_reward_model_path=paths["reward_model_path"])
    with pytest.raises(ValueError, match=r"^eval_reward_model_path: nothing to judge; give num_eval_examples"):
        run(cfg)
    with pytest.raises(ValueError, match=r"^eval_reward_model_path: 'nowhere' is neither a folder here nor"):
        run(cfg, eval_reward_model_path="nowhere")


@pytest.mark.parametrize("opponents", ["reference", "rollouts"])
def test_psi_makes_the_reward_a_mean_preference_and_leaves_the_evaluation_in_scores(paths, opponents):
    """Against responses of the dataset, or of its own group, by a judge that can be followed by hand."""

    def length(rollouts):
        return torch.tensor([0.5 * len([*r.prefix.token_ids, *r.completion]) for r in rollouts])

    seen = []

    def watch(rollout):
        seen.append(rollout)
        return 0.0

    examples = tiny.examples(8)
    group = 4 if opponents == "rollouts" else 1
    cfg = config(
        paths, max_steps=1, psi="identity", psi_opponents=opponents, reset_group_size=group, num_mini_batches=1
    )
    history = train_on_policy(
        cfg, examples, tiny.examples(2, seed=1), judge=length, reward_functions={"watch": watch}
    ).history
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
    assert history[0]["eval_objective/scores"] > 1  # of the judge, in its own unit


def test_opponents_of_the_group_need_a_group_and_a_psi_a_name(paths):
    with pytest.raises(ValueError, match="reset_group_size: must be at least 2 where psi_opponents is rollouts"):
        config(paths, psi="identity", psi_opponents="rollouts")
    with pytest.raises(ValueError, match=r"^psi: 'logits' is none of identity"):
        train_on_policy(config(paths, psi="logits"), tiny.examples(4))
