"""Tests of the rewards and advantages of rollouts: what each token earns, and independence of the packing order."""

from dataclasses import fields, replace

import pytest
import torch

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.algorithms.update import update
from fastrlhf.config import DRPOConfig, PPOConfig
from fastrlhf.data.packing import unpack
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.loading import load_reward_model
from fastrlhf.rewards.implicit import ImplicitReward
from fastrlhf.rewards.terms import Rewards
from fastrlhf.types import Experience, Prefix, Rollout
from tests import tiny

EOS = tiny.EOS


def config(kind=PPOConfig, **settings):
    fields = {"missing_eos_score": None, "whiten_rewards": False, "response_length": 5, "max_length": 32}
    return kind(**fields | settings)


def rollout(prompt: list[int], reset: list[int], completion: list[int], row: int = 0, depth: float = 0.0) -> Rollout:
    return Rollout(
        prefix=Prefix(token_ids=[*prompt, *reset], num_reset=len(reset), reset_depth=depth, row=row, episode=row),
        completion=completion,
        sampler_logprob=[-1.0] * len(completion),
        ended=EOS in completion,
    )


ROLLOUTS = [
    rollout([5, 6, 7], [], [8, 9, EOS]),
    rollout([5, 6], [7, 8], [9, 10, 11], row=1),  # no EOS
    rollout([9, 8, 7, 6], [5], [12, 13, 14, EOS], row=2),  # ends in the last of 5 slots
    rollout([4], [20, 21, 22, 23], [EOS], row=3),
    rollout([3, 4, 5], [], [25, 26, 27, 28, 29], row=4),  # no EOS
]
SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
FULL = [  # the released code continues sampling after an EOS until each response has filled its 5 slots
    rollout([5, 6, 7], [], [8, 9, EOS, 17, 18]),
    rollout([5, 6], [7, 8], [9, 10, 11], row=1),
    rollout([9, 8, 7, 6], [5], [12, 13, 14, EOS], row=2),
    rollout([4], [20, 21, 22, 23], [EOS], row=3),
    rollout([3, 4, 5], [], [25, EOS, 27, EOS, 29], row=4),
]


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    model = load_reward_model(tiny.save_reward_model(tmp_path_factory.mktemp("judge")), pad_token_id=0)
    return frozen_copy(model)


def experience(cfg, rollouts, critic, order=None, scores=SCORES, packs=None, rewards=None):
    order = list(range(len(rollouts))) if order is None else order
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    packs = packs or pack_episodes(cfg, rollouts, order, policy.device)
    return score_episodes(cfg, policy, reference, critic, rollouts, scores, packs, EOS, rewards)


def rewards(cfg, rollouts, critic, implicit=None) -> list[float]:
    """Returns the reward of each row, which equals the return of the row if lambda is 0 and the critic gives 0."""
    zeros = frozen_copy(critic)
    torch.nn.init.zeros_(zeros.score.weight)
    cfg = replace(cfg, lam=0.0, gamma=1.0)
    found, _ = experience(cfg, rollouts, zeros, rewards=Rewards(config=cfg, implicit=implicit))
    assert not found.value.any()
    return found.returns.tolist()


@pytest.mark.parametrize("kind", ["fixed", "reference"])
@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_the_index_of_the_packs_covers_every_row_once_and_points_to_its_own_token(kind, num_mini_batches):
    cfg = config(compat=kind, num_mini_batches=num_mini_batches, micro_batch_tokens=16)
    rollouts, order = [*FULL, rollout([9], [], [9, 9, 9, 9, 9])], [3, 0, 5, 4, 2, 1]
    packs = pack_episodes(cfg, rollouts, order, torch.device("cpu"))
    assert len(packs) == num_mini_batches
    given = [r.prefix.num_reset if kind == "reference" else 0 for r in rollouts]
    tokens = [
        token
        for r, k in zip(rollouts, given, strict=True)
        for token in [*r.prefix.token_ids[len(r.prefix.token_ids) - k :], *r.completion]
    ]
    flat = torch.full((len(tokens),), -1)
    for item in (item for mini in packs for item in mini):
        assert (flat[item.index] == -1).all()
        flat[item.index] = item.batch.targets
    assert flat.tolist() == tokens
    members = [sorted(map(tuple, (s for item in mini for s in unpack(item.batch)))) for mini in packs]
    size = len(order) // num_mini_batches
    assert members == [
        sorted((*rollouts[i].prefix.token_ids, *rollouts[i].completion) for i in order[start : start + size])
        for start in range(0, len(order), size)
    ]


def test_the_score_lands_on_the_last_token_and_a_missing_eos_costs_the_penalty(critic):
    cfg = config(kl_coef=0.0, missing_eos_penalty=0.5)
    assert rewards(cfg, ROLLOUTS, critic) == [0, 0, 1, 0, 0, 1.5, 0, 0, 0, 3, 4, 0, 0, 0, 0, 4.5]


def test_missing_eos_score_replaces_the_score(critic):
    cfg = config(kl_coef=0.0, missing_eos_score=-1.0)
    assert rewards(cfg, ROLLOUTS, critic) == [0, 0, 1, 0, 0, -1, 0, 0, 0, 3, 4, 0, 0, 0, 0, -1]


def test_the_return_of_a_truncated_episode_includes_the_value_after_its_last_token(critic):
    """With lambda 0 the return of the last row is reward + gamma * V(state after the last token), where V is 0 after
    an episode that has ended. The critic of this test is a reward model, so V is the score of the whole text."""
    cfg = config(kl_coef=0.0, lam=0.0, gamma=0.5, truncation="bootstrap")
    found, metrics = experience(cfg, ROLLOUTS, critic)
    judge = reward_model_judge(critic, eos_token_id=EOS, micro_batch_tokens=1000)
    cut = torch.tensor([not r.ended for r in ROLLOUTS])
    last = found.returns[found.cu_rows[1:].long() - 1]
    torch.testing.assert_close(last, torch.where(cut, 0.5 * judge(ROLLOUTS), SCORES), rtol=1e-6, atol=1e-6)
    assert metrics["objective/scores"] == SCORES.mean()  # truncated episodes are judged as well
    assert metrics["reward/score"] == pytest.approx((1 + 3 + 4) / 5)


def test_every_row_earns_minus_kl_coef_times_its_log_ratio_to_the_reference(critic):
    cfg = config(kl_coef=0.25)
    found, metrics = experience(cfg, ROLLOUTS, critic)
    log_ratio = found.sampler_logprob - found.reference_logprob
    assert log_ratio.abs().min() > 1e-4
    score = torch.tensor([0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 4, 0, 0, 0, 0, 5.0])
    torch.testing.assert_close(torch.tensor(rewards(cfg, ROLLOUTS, critic)), score - 0.25 * log_ratio)
    assert metrics["objective/kl"] == pytest.approx(log_ratio.sum().item() / 5, rel=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.25 * log_ratio.sum().item() / 5, rel=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(3 - 0.25 * log_ratio.sum().item() / 5, rel=1e-5)
    assert metrics["objective/scores"] == 3.0


def test_kl_estimates_engine_ratios_and_truncation_are_reported(critic):
    cfg = config(cliprange=0.2, cliprange_high=1.0)
    plain, _ = experience(cfg, ROLLOUTS, critic)
    shifts = torch.linspace(-0.5, 1.0, 16)  # log(trainer's p / engine's p): below, within, above the band
    drawn = (plain.sampler_logprob - shifts).split([3, 3, 4, 1, 5])
    rollouts = [replace(r, sampler_logprob=x.tolist()) for r, x in zip(ROLLOUTS, drawn, strict=True)]
    found, metrics = experience(cfg, rollouts, critic)
    delta = (found.sampler_logprob - found.reference_logprob).double()
    assert metrics["objective/kl_k2"] == pytest.approx((delta**2 / 2).sum().item() / 5, rel=1e-5)
    assert metrics["objective/kl_k3"] == pytest.approx((torch.exp(-delta) - 1 + delta).sum().item() / 5, rel=1e-5)
    ratio = shifts.exp()
    assert metrics["sampling/outside_clip"] == pytest.approx(((ratio < 0.8) | (ratio > 2)).sum().item() / 16)
    assert (ratio < 0.8).any()
    assert (ratio > 2).any()
    assert metrics["completions/clipped_ratio"] == 2 / 5
    assert metrics["objective/scores_clipped"] == 3.5  # the mean of 2 and 5
    _, ended = experience(cfg, [ROLLOUTS[0], *ROLLOUTS[2:4]], critic, scores=SCORES[:3])
    assert ended["completions/clipped_ratio"] == 0
    assert "objective/scores_clipped" not in ended


def log_ratio(dpo, reference, rollouts) -> torch.Tensor:
    """Returns log(dpo / reference) at temperature 1 of every sampled token, computed from the models' logits."""
    found = []
    for r in rollouts:
        ids = torch.tensor([[*r.prefix.token_ids, *r.completion]])
        ours, theirs = (m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (dpo, reference))
        ratio = (ours - theirs).gather(1, ids[0, 1:, None])[:, 0]
        found.append(ratio[-len(r.completion) :].detach())
    return torch.cat(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_sampled_token_earns_the_dpo_log_ratio_at_temperature_1(critic, temperature):
    """Tests a DPO model with and without its own reference. Prompt tokens and reset tokens must earn 0."""
    cfg = config(
        kl_coef=0.0, dpo_model_path="dpo", dpo_reward_scale=0.5, temperature=temperature, micro_batch_tokens=16
    )
    score = torch.tensor([0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 4, 0, 0, 0, 0, 5.0])
    dpo, own, run_reference = tiny.policy(seed=1), tiny.policy(seed=2), tiny.policy(seed=5)
    for reference in (None, own):
        earned = rewards(cfg, ROLLOUTS, critic, ImplicitReward(model=dpo, reference=reference))
        expected = score + 0.5 * log_ratio(dpo, reference or run_reference, ROLLOUTS)
        torch.testing.assert_close(torch.tensor(earned), expected, rtol=1e-5, atol=1e-5)


def test_in_compat_reference_only_tokens_up_to_the_eos_earn_token_rewards(critic):
    cfg = config(compat="reference", kl_coef=0.0, dpo_model_path="dpo", dpo_reward_scale=0.5)
    implicit = ImplicitReward(model=tiny.policy(seed=1), reference=None)
    found = torch.tensor(rewards(cfg, FULL, critic, implicit)) - torch.tensor(rewards(cfg, FULL, critic))
    earns = [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert found.abs().gt(1e-4).int().tolist() == earns


def test_compat_fixed_trains_and_whitens_only_the_sampled_tokens(critic):
    found, _ = experience(config(), ROLLOUTS, critic)
    assert found.cu_rows.tolist() == [0, 3, 6, 10, 11, 16]
    assert found.mask.all()
    assert found.advantage.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.advantage.square().mean().item() == pytest.approx(1, rel=1e-5)


def test_compat_reference_has_rows_for_reset_tokens_and_tokens_after_the_eos(critic):
    found, _ = experience(config(DRPOConfig, compat="reference", whiten_rewards=True), FULL, critic)
    assert found.cu_rows.tolist() == [0, 5, 10, 15, 20, 25]
    given = [0] * 5 + [1, 1, 0, 0, 0] + [1, 0, 0, 0, 0] + [1, 1, 1, 1, 0] + [0] * 5
    assert found.mask.tolist() == [not g for g in given]
    assert found.advantage.mean().item() == pytest.approx(0, abs=1e-6)  # over all 25 rows, masked ones included
    assert found.advantage.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert found.advantage[5:7].abs().min() > 1e-4


def test_compat_reference_pays_at_the_first_eos_and_ignores_one_in_the_last_slot(critic):
    cfg = config(DRPOConfig, compat="reference", kl_coef=0.0, missing_eos_score=-1.0)
    first, no_end, last_slot, only, twice = torch.tensor(rewards(cfg, FULL, critic)).split(5)
    assert first.tolist() == [0, 0, 1, 0, 0]
    assert no_end.tolist() == [0, 0, 0, 0, -1]
    assert last_slot.tolist() == [0, 0, 0, 0, -1]
    assert only.tolist() == [0, 0, 0, 0, -1]
    assert twice.tolist() == [0, 5, 0, 0, 0]


def test_whitened_rewards_keep_their_mean_and_are_divided_by_the_deviation_over_all_rows(critic):
    cfg = config(DRPOConfig, compat="reference", kl_coef=0.0, missing_eos_score=None, missing_eos_penalty=None)
    plain = torch.tensor(rewards(cfg, FULL, critic))
    whitened = torch.tensor(rewards(replace(cfg, whiten_rewards=True), FULL, critic))
    assert plain.sum() == 15
    expected = (plain - plain.mean()) / plain.std(correction=0) + plain.mean()
    torch.testing.assert_close(whitened, expected)


@pytest.mark.parametrize("keys", [{}, {"truncation": "bootstrap"}, {"compat": "reference"}])
def test_the_order_of_the_packs_and_their_size_change_no_number(critic, keys):
    cfg = config(micro_batch_tokens=1000, **keys)
    rollouts = ROLLOUTS if cfg.compat == "fixed" else FULL
    found, metrics = experience(cfg, rollouts, critic)
    for budget, order in ((1000, [4, 2, 0, 3, 1]), (12, [0, 1, 2, 3, 4]), (16, [2, 4, 1, 0, 3])):
        other, other_metrics = experience(replace(cfg, micro_batch_tokens=budget), rollouts, critic, order)
        for field in fields(Experience):
            torch.testing.assert_close(getattr(other, field.name), getattr(found, field.name), rtol=1e-5, atol=1e-5)
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_tokens_after_the_eos_change_nothing_in_compat_fixed(critic):
    """Engines that stop at the EOS and engines that sample past it must give equal rollouts and scores."""
    policy = tiny.policy()
    prefixes = [Prefix(token_ids=[3 + i % 29, 9, 4], num_reset=i % 3, row=i, episode=i) for i in range(60)]
    stopping, going_on = (
        make_engine(config(response_length=9, compat=kind, temperature=50.0), policy, EOS).generate(prefixes)
        for kind in ("fixed", "reference")
    )
    assert sum(len(a.completion) < len(b.completion) for a, b in zip(stopping, going_on, strict=True)) > 3
    for stopped, whole in zip(stopping, going_on, strict=True):
        assert stopped.completion == whole.completion[: len(stopped.completion)]
        assert stopped.ended == whole.ended == (stopped.completion[-1] == EOS)
    judge = reward_model_judge(critic, eos_token_id=EOS, micro_batch_tokens=1000)
    assert torch.equal(judge(stopping), judge(going_on))
    spoilt = [
        replace(whole, completion=[*stopped.completion, *[7] * (len(whole.completion) - len(stopped.completion))])
        for stopped, whole in zip(stopping, going_on, strict=True)
    ]
    assert torch.equal(judge(spoilt), judge(going_on))


def test_in_compat_reference_reset_tokens_give_the_policy_no_gradient(critic):
    """Changes the advantages of the reset tokens, which must not change the policy's gradient."""
    cfg = config(DRPOConfig, compat="reference", num_ppo_epochs=1)
    policy, value_model = tiny.policy(), frozen_copy(critic).requires_grad_(True)
    packs = pack_episodes(cfg, FULL, [0, 1, 2, 3, 4], policy.device)
    found, _ = score_episodes(cfg, policy, tiny.policy(seed=5), critic, FULL, SCORES, packs, EOS)
    moved = replace(found, advantage=torch.where(found.mask, found.advantage, 100.0))
    recorder = tiny.GradientRecorder({"": policy, "value_": value_model})
    for given in (found, moved):
        update(cfg, policy, value_model, recorder, FULL, given, packs, seed=(0, 0))
    assert all(torch.equal(a, b) for a, b in zip(recorder.steps[0][0], recorder.steps[1][0], strict=True))
    assert max(g.abs().max() for g in recorder.steps[0][0]) > 1e-4


def test_the_explained_variance_of_the_critic_is_reported(critic):
    found, metrics = experience(config(), ROLLOUTS, critic)
    left = (found.returns - found.value).var() / found.returns.var()
    assert metrics["critic/explained_var"] == pytest.approx(1 - left.item(), rel=1e-4)


def test_reset_episodes_and_others_are_reported_separately(critic):
    _, metrics = experience(config(DRPOConfig, reset_prob=0.5), ROLLOUTS, critic)
    assert metrics["drpo/reset_fraction"] == 3 / 5
    assert metrics["drpo/prefix_len_mean"] == (2 + 1 + 4) / 5
    assert metrics["drpo/score_reset"] == 3.0  # the mean of 2, 3, 4
    assert metrics["drpo/score_scratch"] == 3.0  # the mean of 1, 5
    assert metrics["val/num_eos_tokens"] == 3.0
    assert metrics["completions/mean_length"] == 16 / 5
    _, plain = experience(config(), ROLLOUTS, critic)
    assert not any(name.startswith("drpo/") for name in plain)


def test_scores_are_reported_by_reset_depth_in_fifths(critic):
    depths = [0.0, 0.19, 0.2, 0.99, 0.25]
    rollouts = [rollout([5, 6], [7] * (d > 0), [9, EOS], row=i, depth=d) for i, d in enumerate(depths)]
    _, metrics = experience(config(DRPOConfig, reset_prob=0.5), rollouts, critic)
    found = {name: value for name, value in metrics.items() if name.startswith("drpo/score_depth_")}
    assert found == {"drpo/score_depth_0": 2.0, "drpo/score_depth_1": 4.0, "drpo/score_depth_4": 4.0}  # mean(3, 5)


@pytest.mark.parametrize(("estimator", "scale"), [("rloo", 1.0), ("grpo", 1 / (2 * (0.5**0.5 + 1e-4)))])
def test_without_a_critic_every_token_has_the_advantage_of_its_episode_in_its_group(estimator, scale):
    """The groups have returns (1, 2) and (3, 4). For both groups rloo (leave-one-out) gives advantages -1 and 1. grpo
    divides the deviations from the mean, -1/2 and 1/2, by the sample standard deviation sqrt(1/2) plus 1e-4."""
    cfg = config(kl_coef=0.0, advantage_estimator=estimator, num_generations=2)
    found, metrics = experience(cfg, ROLLOUTS[:4], None, order=[1, 0], scores=SCORES[:4])
    signs = torch.tensor([-1.0] * 3 + [1.0] * 3 + [-1.0] * 4 + [1.0])
    torch.testing.assert_close(found.advantage, scale * signs)
    assert found.value is found.returns is None
    assert "critic/explained_var" not in metrics


def test_the_return_of_an_episode_includes_its_kl():
    cfg = config(kl_coef=0.25, advantage_estimator="rloo", num_generations=2)
    found, _ = experience(cfg, ROLLOUTS[:4], None, order=[0, 1], scores=SCORES[:4])
    log_ratio = found.sampler_logprob - found.reference_logprob
    returns = SCORES[:4] - 0.25 * torch.stack([part.sum() for part in log_ratio.split([3, 3, 4, 1])])
    first = torch.stack([returns[0] - returns[1], returns[1] - returns[0]])
    torch.testing.assert_close(found.advantage[[0, 3]], first)


@torch.no_grad()
def state_kl(temperature: float, rollouts) -> torch.Tensor:
    """Returns KL(policy || reference) in the state before every sampled token, computed from the models' logits."""
    found = []
    for r in rollouts:
        ids = torch.tensor([[*r.prefix.token_ids, *r.completion]])
        p, q = (
            (model(input_ids=ids).logits[0, -len(r.completion) - 1 : -1] / temperature).log_softmax(-1)
            for model in (tiny.policy(), tiny.policy(seed=5))
        )
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


def test_with_exact_kl_every_state_is_charged_its_divergence(critic):
    cfg = config(kl_coef=0.25, kl_estimator="exact", temperature=0.7, micro_batch_tokens=16)
    expected = state_kl(0.7, ROLLOUTS)
    score = torch.tensor([0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 4, 0, 0, 0, 0, 5.0])
    torch.testing.assert_close(
        torch.tensor(rewards(cfg, ROLLOUTS, critic)), score - 0.25 * expected, rtol=1e-5, atol=1e-5
    )
    found, metrics = experience(cfg, ROLLOUTS, critic)
    plain, sampled = experience(replace(cfg, kl_estimator="k1"), ROLLOUTS, critic)
    assert torch.equal(found.sampler_logprob, plain.sampler_logprob)
    assert metrics["objective/kl_exact"] == pytest.approx(expected.sum().item() / 5, rel=1e-5)
    assert metrics["objective/kl"] == pytest.approx(sampled["objective/kl"], rel=1e-5)
    assert "objective/kl_exact" not in sampled


@pytest.mark.parametrize("whitened", [False, True])
def test_with_exact_kl_each_advantage_includes_the_tokens_own_log_ratio(whitened):
    """A token's advantage is its episode's advantage plus kl_coef * (exact KL in its state - its own log-ratio)."""
    cfg = config(kl_coef=0.25, kl_estimator="exact", advantage_estimator="rloo", num_generations=2)
    cfg = replace(cfg, temperature=1.0, whiten_rewards=whitened, share_trunks=False)
    found, _ = experience(cfg, ROLLOUTS[:4], None, order=[0, 1], scores=SCORES[:4])
    kl = state_kl(1.0, ROLLOUTS[:4])
    reward = torch.tensor([0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 4.0]) - 0.25 * kl
    own = 0.25 * (kl - (found.sampler_logprob - found.reference_logprob))
    assert own.abs().min() > 1e-4
    if whitened:
        own = own / reward.std(correction=0)
        reward = (reward - reward.mean()) / reward.std(correction=0) + reward.mean()
    a, b, c, d = (part.sum() for part in reward.split([3, 3, 4, 1]))
    of_episode = torch.stack([a - b, b - a, c - d, d - c]).repeat_interleave(torch.tensor([3, 3, 4, 1]))
    torch.testing.assert_close(found.advantage, of_episode + own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_a_kl_in_the_loss_is_no_reward(critic, estimator):
    cfg = config(kl_coef=0.25, kl_placement="loss", kl_estimator=estimator)
    assert rewards(cfg, ROLLOUTS, critic) == [0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 4, 0, 0, 0, 0, 5]
    found, metrics = experience(cfg, ROLLOUTS, critic)
    assert "reward/kl" not in metrics
    assert metrics["objective/non_score_reward"] == 0.0
    assert (found.reference_states is None) == (estimator == "k2")


def test_the_truncated_importance_weight_is_the_trainers_probability_over_the_engines(critic):
    """Uses an engine that reports a log-prob of -4 nats for every token. Tokens that were not sampled have weight 1."""

    def of_engine(rollouts):
        return [replace(r, sampler_logprob=[-4.0] * len(r.completion)) for r in rollouts]

    plain, _ = experience(config(), of_engine(ROLLOUTS), critic)
    assert plain.weight is None
    ratio = (plain.sampler_logprob + 4).exp()
    assert 0 < (ratio > 1.5).sum() < 16
    found, metrics = experience(config(sampler_is_cap=1.5), of_engine(ROLLOUTS), critic)
    torch.testing.assert_close(found.weight, ratio.clamp(max=1.5))
    assert metrics["sampling/is_weight_mean"] == pytest.approx(ratio.clamp(max=1.5).mean().item(), rel=1e-6)
    assert metrics["sampling/is_weight_capped"] == (ratio > 1.5).sum().item() / 16
    cfg = config(DRPOConfig, compat="reference", sampler_is_cap=2.0)
    authors, _ = experience(cfg, of_engine(FULL), critic)
    assert (authors.weight[~authors.mask] == 1).all()
    expected = (authors.sampler_logprob[authors.mask] + 4).exp().clamp(max=2.0)
    torch.testing.assert_close(authors.weight[authors.mask], expected)
