"""Tests of policy updates with settings other than PPO's defaults: the loss against an independent padded loop, and the
steps that an update takes."""

from dataclasses import replace

import pytest
import torch

from fastrlhf.algorithms import update as update_module
from fastrlhf.algorithms.experience import pack_episodes, score_episodes, with_reference_states
from fastrlhf.algorithms.update import update
from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.distributed.rows import SpreadRows
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.forward import scored_states
from fastrlhf.models.loading import load_reward_model
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import Experience, Prefix, Rollout
from tests import tiny

COMPLETIONS = [[8, 9, tiny.EOS], [9], [10, 11, 12, 13, 14, 15], [12, tiny.EOS], [20, 21, 22, 23, tiny.EOS], [25, 26]]
ROLLOUTS = [
    Rollout(
        prefix=Prefix(token_ids=[3 + (7 * i + j) % 29 for j in range(2 + i)], num_reset=0, row=i, episode=i),
        completion=completion,
        sampler_logprob=[-1.0] * len(completion),
        ended=tiny.EOS in completion,
    )
    for i, completion in enumerate(COMPLETIONS)
]
NUM_ROWS = sum(map(len, COMPLETIONS))
SHIFTS = torch.linspace(-1.5, 1.5, NUM_ROWS)[torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(3))]
"""Log-ratios log(policy / sampler) of the rows; the ratios are 0.22 .. 4.5."""


def config(**settings) -> PPOConfig:
    fields = {
        "per_device_train_batch_size": 6,
        "num_ppo_epochs": 1,
        "max_length": 32,
        "response_length": 7,
        "temperature": 0.8,
    }
    return PPOConfig(**fields | settings)


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    return load_reward_model(tiny.save_reward_model(folder), pad_token_id=0)


def packed(cfg, policy, rollouts=ROLLOUTS):
    return pack_episodes(cfg, rollouts, list(range(len(rollouts))), policy.device)


def scored(cfg, policy, reference, critic=None) -> Experience:
    """Scores rollouts as the trainer does. If there is no critic, all rollouts form one group with rloo advantages."""
    packs, judge = packed(cfg, policy), frozen_copy(critic) if critic else None
    if judge is None:
        cfg = replace(cfg, advantage_estimator="rloo", num_generations=len(ROLLOUTS))
    scores = torch.linspace(-1, 2, len(ROLLOUTS))
    return score_episodes(cfg, policy, reference, judge, ROLLOUTS, scores, packs, tiny.EOS)[0]


def moved(experience: Experience, shifts=SHIFTS) -> Experience:
    """Returns a copy of `experience` whose log-ratios (policy to sampler) differ from the original by `shifts` nats,
    with random advantages of both signs."""
    draw = torch.Generator().manual_seed(0)
    return replace(
        experience,
        sampler_logprob=experience.sampler_logprob - shifts,
        advantage=torch.randn(len(shifts), generator=draw),
    )


def gradients(cfg, policy, experience, rollouts=ROLLOUTS, **keywords) -> list[torch.Tensor]:
    recorder = tiny.GradientRecorder({"": policy})
    update(cfg, policy, None, recorder, rollouts, experience, packed(cfg, policy, rollouts), seed=(0, 0), **keywords)
    [[found]] = recorder.steps
    return found


def padded_gradients(cfg, policy, reference, experience) -> list[torch.Tensor]:
    """Gradients computed with right-padded [N, L] tensors, full logits and a loop over tokens."""
    sequences = [[*r.prefix.token_ids, *r.completion] for r in ROLLOUTS]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    attention = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    logp = (policy(ids, attention_mask=attention).logits / cfg.temperature).log_softmax(-1)
    with torch.no_grad():
        logq = (reference(ids, attention_mask=attention).logits / cfg.temperature).log_softmax(-1)
    low, high = 1 - cfg.cliprange, 1 + (cfg.cliprange if cfg.cliprange_high is None else cfg.cliprange_high)
    losses, row = [], 0
    for i, r in enumerate(ROLLOUTS):
        if cfg.mask_truncated_completions and not r.ended:
            row += len(r.completion)
            continue
        losses.append([])
        own = [logp[i, len(r.prefix.token_ids) - 1 + t, token] for t, token in enumerate(r.completion)]
        geometric = (torch.stack(own) - experience.sampler_logprob[row : row + len(own)]).mean().exp()
        for t, token in enumerate(r.completion):
            at = len(r.prefix.token_ids) - 1 + t
            lp, lq = logp[i, at, token], logq[i, at, token]
            ratio = (lp - experience.sampler_logprob[row]).clamp(-20, 20).exp()
            if cfg.loss_type == "gspo":  # GSPO-token: advantages differ within an episode here
                ratio = geometric.detach() * (lp - lp.detach()).exp()
            advantage = experience.advantage[row]
            gain = torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
            if cfg.loss_type == "cispo":
                gain = ratio.clamp(max=high).detach() * advantage * lp
            if cfg.dual_clip is not None and advantage < 0:
                gain = torch.max(gain, cfg.dual_clip * advantage)
            loss = -gain
            entropy = -(logp[i, at].exp() * logp[i, at]).sum()
            if cfg.kl_placement == "loss" and cfg.kl_estimator != "exact":
                delta = (lp - lq).detach()
                # The gradient of this term is w delta, as for w k2 and for w k3
                loss = loss + experience.kl_coef * ratio.detach() * delta * lp
            loss = loss - cfg.entropy_coef * entropy
            if experience.weight is not None:
                loss = loss * experience.weight[row]
            if cfg.kl_placement == "loss" and cfg.kl_estimator == "exact":
                loss = loss + experience.kl_coef * (logp[i, at].exp() * (logp[i, at] - logq[i, at])).sum()
            losses[-1].append(loss)
            row += 1
    if cfg.aggregation == "sequence":
        total = torch.stack([torch.stack(part).mean() for part in losses]).mean()
    elif cfg.aggregation == "constant":
        total = torch.stack([loss for part in losses for loss in part]).sum() / (len(ROLLOUTS) * cfg.response_length)
    else:
        total = torch.stack([loss for part in losses for loss in part]).mean()
    policy.zero_grad()
    total.backward()
    found = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    return found


SETTINGS = [
    {},
    {"cliprange_high": 2.0},
    {"dual_clip": 2.0},
    {"entropy_coef": 0.3},
    {"loss_aggregation": "sequence"},
    {"loss_type": "gspo"},
    {"loss_type": "cispo", "cliprange_high": 0.1},
    {"loss_type": "dr_grpo"},
    {"mask_truncated_completions": True},
    {"loss_type": "grpo", "mask_truncated_completions": True, "entropy_coef": 0.3},
    {"sampler_is_cap": 1.5},
    {"kl_placement": "loss", "kl_estimator": "k2", "kl_coef": 0.3},
    {"kl_placement": "loss", "kl_estimator": "k3", "kl_coef": 0.3},
    {"kl_placement": "loss", "kl_estimator": "exact", "kl_coef": 0.3},
    {"kl_placement": "loss", "kl_estimator": "exact", "kl_coef": 0.3, "loss_aggregation": "sequence"}
    | {"sampler_is_cap": 1.5, "entropy_coef": 0.3, "dual_clip": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_is_that_of_an_independent_padded_loop(settings):
    cfg = config(micro_batch_tokens=24, **settings)
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    experience = moved(scored(cfg, policy, reference))
    ours = gradients(cfg, policy, experience, reference=reference)
    expected = padded_gradients(cfg, policy, reference, experience)
    tiny.assert_close_gradients(ours, expected, 1e-4)  # tolerance for two float32 forwards
    if settings:
        plain = padded_gradients(config(), policy, reference, replace(experience, weight=None))
        with pytest.raises(AssertionError):
            tiny.assert_close_gradients(expected, plain, 1e-2)  # confirms that the setting matters


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_log_ratios_of_25_have_no_gradient(dual_clip):
    """Log-ratios beyond +-20 nats have no gradient. The dual clip also bounds their loss, which is e^20 otherwise."""
    cfg = config(dual_clip=dual_clip)
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    far = SHIFTS.clone()
    far[::3], far[1::5] = 25.0, -25.0
    experience = moved(scored(cfg, policy, reference), far)
    assert {(s, a > 0) for s, a in zip(far.tolist(), experience.advantage.tolist(), strict=True)} >= {
        (s, up) for s in (25.0, -25.0) for up in (True, False)
    }
    ours = gradients(cfg, policy, experience)
    tiny.assert_close_gradients(ours, padded_gradients(cfg, policy, reference, experience), 1e-4)


@pytest.mark.parametrize("settings", [{"loss_aggregation": "sequence"}, {"loss_type": "gspo"}, SETTINGS[-1]])
def test_micro_batches_change_no_gradient(settings):
    """Splitting a mini-batch changes only the order of float32 sums, so gradients agree up to rounding."""
    whole, split = config(micro_batch_tokens=1000, **settings), config(micro_batch_tokens=16, **settings)
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    assert len(packed(whole, policy)[0]) == 1 < len(packed(split, policy)[0])
    experience = moved(scored(whole, policy, reference))
    tiny.assert_close_gradients(
        gradients(whole, policy, experience, reference=reference),
        gradients(split, policy, experience, reference=reference),
    )


def test_averaging_by_sequence_gives_the_mean_gradient_of_single_episodes():
    cfg = config()
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    experience = moved(scored(cfg, policy, reference))
    ours = gradients(replace(cfg, loss_aggregation="sequence"), policy, experience)
    alone = []
    for i, rollout in enumerate(ROLLOUTS):
        rows = slice(*experience.cu_rows[i : i + 2].tolist())
        of_one = replace(
            experience,
            cu_rows=torch.tensor([0, len(rollout.completion)], dtype=torch.int32),
            **{name: getattr(experience, name)[rows] for name in ("mask", "trained", "sampler_logprob", "advantage")},
        )
        alone.append(gradients(cfg, policy, of_one, [rollout]))
    tiny.assert_close_gradients(ours, [sum(parts) / len(ROLLOUTS) for parts in zip(*alone, strict=True)])


def test_averaging_by_sequence_gives_the_mean_critic_gradient_of_single_episodes(critic):
    """RTO's released code (arXiv 2404.18922) averages over the tokens of each sequence, and then over the sequences."""
    cfg = config(loss_aggregation="sequence", micro_batch_tokens=24)
    policy, trained = tiny.policy(), frozen_copy(critic).requires_grad_(True)
    experience = scored(cfg, policy, tiny.policy(seed=5), critic)
    experience = replace(experience, returns=experience.returns + SHIFTS)

    def of(cfg, experience, rollouts):
        recorder = tiny.GradientRecorder({"": policy, "value_": trained})
        update(cfg, policy, trained, recorder, rollouts, experience, packed(cfg, policy, rollouts), seed=(0, 0))
        return recorder.steps[0][1]

    alone = []
    for i, rollout in enumerate(ROLLOUTS):
        rows = slice(*experience.cu_rows[i : i + 2].tolist())
        names = ("mask", "trained", "sampler_logprob", "advantage", "value", "returns")
        of_one = replace(
            experience,
            cu_rows=torch.tensor([0, len(rollout.completion)], dtype=torch.int32),
            **{name: getattr(experience, name)[rows] for name in names},
        )
        alone.append(of(config(), of_one, [rollout]))
    whole = of(cfg, experience, ROLLOUTS)
    tiny.assert_close_gradients(whole, [sum(parts) / len(ROLLOUTS) for parts in zip(*alone, strict=True)])
    by_token = of(config(), experience, ROLLOUTS)
    with pytest.raises(AssertionError):
        tiny.assert_close_gradients(whole, by_token, 1e-2)


def test_compat_reference_averages_every_micro_batch_separately(critic):
    """In compat "reference" the gradient is the mean of the gradients of the micro-batches, for any number of tokens in
    each."""
    cfg = config(compat="reference", micro_batch_tokens=24)
    policy, trained = tiny.policy(), frozen_copy(critic).requires_grad_(True)
    experience = moved(scored(cfg, policy, tiny.policy(seed=5), critic))
    [packs] = packed(cfg, policy)
    assert len({item.batch.num_rows for item in packs}) > 1

    def of(packs):
        recorder = tiny.GradientRecorder({"": policy, "value_": trained})
        update(cfg, policy, trained, recorder, ROLLOUTS, experience, [packs], seed=(0, 0))
        return recorder.steps[0]

    alone = [of([item]) for item in packs]
    for ours, parts in zip(of(packs), zip(*alone, strict=True), strict=True):
        tiny.assert_close_gradients(ours, [sum(each) / len(packs) for each in zip(*parts, strict=True)])


def test_compat_reference_redraws_micro_batches_for_each_pass_and_logs_means_of_means(critic, monkeypatch):
    """In compat "reference" each micro-batch is averaged separately, so the result depends on the order of episodes in
    a pass."""
    cfg = config(compat="reference", micro_batch_tokens=24, num_ppo_epochs=3)
    policy, trained = tiny.policy(), frozen_copy(critic).requires_grad_(True)
    experience = moved(scored(cfg, policy, tiny.policy(seed=5), critic))
    found = []

    def noted(config, rollouts, order, device):
        [packs] = pack_episodes(config, rollouts, order, device)
        found.append([item.index.tolist() for item in packs])
        return [packs]

    monkeypatch.setattr(update_module, "pack_episodes", noted)
    recorder = tiny.GradientRecorder({"": policy, "value_": trained})
    first = packed(cfg, policy)
    metrics = update(cfg, policy, trained, recorder, ROLLOUTS, experience, first, seed=(0, 0))
    assert len(found) == 2  # passes 2 and 3; the first pass reuses the packs with which the episodes were scored
    assert found[0] != found[1]
    means = []
    for index in [*(item.index.tolist() for item in first[0]), *found[0], *found[1]]:
        means.append(SHIFTS[index].exp().mean().item())
    assert metrics["val/ratio"] == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_the_clip_fraction_is_reported_with_and_without_the_dual_clip():
    cfg = config(dual_clip=2.0)
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    experience = moved(scored(cfg, policy, reference))

    def metrics(cfg):
        recorder = tiny.GradientRecorder({"": policy})
        return update(cfg, policy, None, recorder, ROLLOUTS, experience, packed(cfg, policy), seed=(0, 0))

    ratio = SHIFTS.exp()
    expected = ((experience.advantage < 0) & (ratio > 2.0)).float().mean().item()
    dual, plain = metrics(cfg), metrics(config())
    assert expected > 0
    assert dual["policy/dual_clipfrac_avg"] == pytest.approx(expected)
    assert dual["policy/clipfrac_avg"] == plain["policy/clipfrac_avg"] > 0
    assert "policy/dual_clipfrac_avg" not in plain


def optimised(cfg, critic=None, **keywords):
    """Runs an update with AdamW; returns (metrics, policy, critic)."""
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    critic = None if critic is None else frozen_copy(critic).requires_grad_(True)
    models = {"": policy} | ({"value_": critic} if critic else {})
    optimizer = Optimizer(models, cfg, num_steps=cfg.num_ppo_epochs * cfg.num_mini_batches)
    experience = scored(cfg, policy, reference, critic)
    metrics = update(cfg, policy, critic, optimizer, ROLLOUTS, experience, packed(cfg, policy), seed=(0, 0), **keywords)
    return metrics, policy, critic


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


FAST = {"learning_rate": 3e-3, "lr_scheduler_type": "constant"}


def test_the_remaining_passes_are_skipped_beyond_target_kl(critic):
    """The update stops in the second pass because the KL is too large; policy and critic keep the weights of the first
    pass."""
    one = optimised(config(num_ppo_epochs=1, **FAST), critic)
    stopped = optimised(config(num_ppo_epochs=4, target_kl=1e-6, **FAST), critic)
    assert stopped[0]["policy/stopped_passes"] == 3.0
    assert stopped[0]["policy/approxkl_avg"] > 0.5e-6  # the mean over two passes; the KL of the first pass is 0
    assert same(one[1], stopped[1])
    assert same(one[2], stopped[2])


def test_target_kl_is_decided_for_every_mini_batch(critic):
    """The update stops at the second mini-batch of the first pass, so that no pass is complete."""
    cfg = config(num_ppo_epochs=3, num_mini_batches=2, **FAST)
    assert optimised(replace(cfg, target_kl=1e-6), critic)[0]["policy/stopped_passes"] == 3.0


def test_a_target_kl_that_is_not_reached_changes_no_bit(critic):
    cfg = config(num_ppo_epochs=3, num_mini_batches=2, **FAST)
    plain, limited = optimised(cfg, critic), optimised(replace(cfg, target_kl=100.0), critic)
    assert limited[0] == plain[0] | {"policy/stopped_passes": 0.0}
    assert same(plain[1], limited[1])


def test_a_critic_warmup_leaves_the_policy_bit_identical(critic):
    cfg = config(num_ppo_epochs=2, weight_decay=0.1, **FAST)
    usual, warm = optimised(cfg, critic), optimised(cfg, critic, critic_only=True)
    assert same(warm[1], tiny.policy())
    assert not same(usual[1], tiny.policy())
    assert same(warm[2], usual[2])
    assert not same(warm[2], critic)
    assert set(usual[0]) - set(warm[0]) == {
        *("loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "grad_norm")
    }


def test_the_kl_in_the_loss_is_reported_before_its_coefficient():
    cfg = config(kl_placement="loss", kl_estimator="exact", kl_coef=0.3, micro_batch_tokens=24)
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    experience = scored(cfg, policy, reference)
    recorder = tiny.GradientRecorder({"": policy})
    metrics = update(
        cfg, policy, None, recorder, ROLLOUTS, experience, packed(cfg, policy), seed=(0, 0), reference=reference
    )
    total = torch.zeros(())
    with torch.no_grad():
        for r in ROLLOUTS:
            ids = torch.tensor([[*r.prefix.token_ids, *r.completion]])
            p, q = ((m(ids).logits[0, -len(r.completion) - 1 : -1] / 0.8).log_softmax(-1) for m in (policy, reference))
            total += (p.exp() * (p - q)).sum()
    assert metrics["loss/kl_avg"] == pytest.approx(total.item() / NUM_ROWS, rel=1e-5)
    assert metrics["val/ratio"] == 1.0


def test_reference_states_are_computed_again_bit_for_bit(critic):
    """A resumed update needs them, because checkpoints do not hold them."""
    cfg, policy, reference = config(kl_placement="loss", kl_estimator="exact"), tiny.policy(), tiny.policy(seed=5)
    packs = pack_episodes(cfg, ROLLOUTS, [1, 0, 3, 5, 2, 4], policy.device)
    scores = torch.zeros(len(ROLLOUTS))
    found, _ = score_episodes(cfg, policy, reference, critic, ROLLOUTS, scores, packs, tiny.EOS)
    again = with_reference_states(replace(found, reference_states=None, reference_rows=None), reference, packs)
    assert again.reference_states is not None
    assert again.reference_rows is not None
    assert torch.equal(again.reference_states, found.reference_states)
    assert torch.equal(again.reference_rows, found.reference_rows)
    assert sorted(again.reference_rows.tolist()) == list(range(len(found.mask)))
    expected = scored_states(reference, pack([sequence(ROLLOUTS[0].prefix.token_ids, ROLLOUTS[0].completion)]))
    held = SpreadRows(again.reference_states, again.reference_rows)
    index = torch.arange(len(ROLLOUTS[0].completion))
    torch.testing.assert_close(held.rows(index).at(index), expected, rtol=1e-5, atol=1e-6)
