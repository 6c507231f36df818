"""Tests of pair losses on rollouts: values by hand, gradients in closed form, and the policies to which they
converge."""

import math
from dataclasses import replace

import pytest
import torch

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.pair_update import loss_of_pairs, num_mini_batch_pairs, rows_of, select_pairs, update_pairs
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.prefixes import draw_prefixes
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import GRPOConfig, PPOConfig
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.loading import load_policy
from tests import tiny
from tests.algorithms.test_ppo import GradientRecorder, config, paths, tokenized  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture)

CU_ROWS = torch.tensor([0, 2, 3, 6, 7], dtype=torch.int32)  # two groups of two episodes
MASK = torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool()
REWARD = torch.tensor([0.0, 1.0, 3.0, 0.5, 0.5, 0.0, -1.0])  # returns 1, 3; 1, -1
LOGPROB = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.25, -9.0, -2.0])
BASE = torch.tensor([-1.5, -2.0, -1.0, -1.0, -1.0, -3.0, -1.0])
MARGINS = torch.tensor([0.5 - 0.5, (-0.5 + 0.75) - -1.0])  # D of (better, worse) episodes (1, 0) and (2, 3)
DIFFERENCE = torch.tensor([2.0, 2.0])


SETTINGS = {
    "rebel": {"pair_loss": "rebel", "pair_eta": 0.75},
    "ipo": {"pair_loss": "ipo", "pair_beta": 0.3},
    "dpo": {"pair_loss": "dpo", "pair_beta": 0.3},
}


def pairs_config(**settings) -> PPOConfig:
    fields = {"update": "pair", "num_generations": 2, "per_device_train_batch_size": 4}
    return GRPOConfig(**fields | settings)


def closed_form(cfg: PPOConfig) -> tuple[float, torch.Tensor]:
    """Returns the mean loss of two pairs, and its derivatives with respect to their log-ratio differences D."""
    match cfg.pair_loss:
        case "rebel":
            error = MARGINS - cfg.pair_eta * DIFFERENCE
            return (error**2).mean().item(), error
        case "ipo":
            error = MARGINS - (1 / (1 + math.exp(-2.0)) - 0.5) / cfg.pair_beta
            return (error**2).mean().item(), error
        case _:
            z = cfg.pair_beta * MARGINS
            return -torch.nn.functional.logsigmoid(z).mean().item(), -cfg.pair_beta * torch.sigmoid(-z) / 2


@pytest.mark.parametrize("kind", ["rebel", "ipo", "dpo"])
def test_loss_and_gradient_are_the_closed_form(kind):
    cfg = pairs_config(**SETTINGS[kind])
    logprob = LOGPROB.clone().requires_grad_()
    loss, metrics = loss_of_pairs(cfg, logprob, BASE, REWARD, MASK, CU_ROWS, num_mini_batch_pairs(cfg))
    loss.backward()
    expected, slope = closed_form(cfg)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # dD / dlogprob of each row: +1 in the better response of a pair, -1 in the worse one, 0 outside the mask
    sign = torch.tensor([-1.0, -1, 1, 1, 1, 0, -1])
    torch.testing.assert_close(logprob.grad, sign * slope[torch.tensor([0, 0, 0, 1, 1, 1, 1])], rtol=1e-6, atol=1e-6)
    found = {name: metric.value.item() for name, metric in metrics.items()}
    assert found == {
        "loss": pytest.approx(2 * expected, rel=1e-6),
        "pairs": 2,
        "accuracy": 1,  # D is 0 and 1.25, and only a positive D counts as right
        "margin": pytest.approx(1.25),
        "return_difference": 4,
    }


def test_equal_returns_give_dpo_no_loss_and_rebel_a_target_of_zero():
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for kind, expected in (("dpo", 0.0), ("rebel", (MARGINS**2).mean().item())):
        logprob = LOGPROB.clone().requires_grad_()
        loss, _ = loss_of_pairs(pairs_config(pair_loss=kind), logprob, BASE, reward, MASK, CU_ROWS, 2)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert bool(logprob.grad.any()) == (kind == "rebel")


def test_pairs_of_a_group():
    returns = torch.tensor([1.0, 4.0, 4.0, 0.0, 2.0, 2.0, 2.0, 2.0])
    better, worse = select_pairs(returns, 4, "neighbours")
    assert (better.tolist(), worse.tolist()) == ([1, 2, 4, 6], [0, 3, 5, 7])
    better, worse = select_pairs(returns, 4, "best_worst")
    assert (better.tolist(), worse.tolist()) == ([1, 4], [3, 7])
    assert num_mini_batch_pairs(pairs_config(num_generations=4, per_device_train_batch_size=16)) == 8
    assert num_mini_batch_pairs(pairs_config(pair_select="best_worst", per_device_train_batch_size=16)) == 8


def test_rows_of_episodes():
    rows, starts = rows_of(torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([1, 0]))
    assert (rows.tolist(), starts.tolist()) == ([2, 3, 4, 0, 1], [0, 3, 5])


@pytest.mark.parametrize("kind", ["rebel", "ipo"])
def test_enumerated_pairs_lead_to_the_policy_in_closed_form(kind):
    """Trains on all pairs of four one-token responses (rebel) or two (ipo). The minimiser of rebel is the policy
    sampler * exp(eta r) / Z. The minimiser of ipo has the log-ratio difference D = (p - 1/2) / tau."""
    cfg = pairs_config(**SETTINGS[kind])
    num = 4 if kind == "rebel" else 2
    reward = torch.tensor([1.0, -1.0, 0.5, 2.0])[:num]
    base = torch.tensor([0.1, 0.2, 0.3, 0.4])[:num].log().log_softmax(0)
    ends = [(a, b) for a in range(num) for b in range(a)]
    tokens = torch.tensor(ends).flatten()
    cu_rows = torch.arange(len(tokens) + 1, dtype=torch.int32)
    logits = torch.zeros(num, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logprob = logits.log_softmax(0)[tokens]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        loss, _ = loss_of_pairs(cfg, logprob, base[tokens], reward[tokens], mask, cu_rows, len(ends))
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().log_softmax(0)
    if kind == "rebel":
        torch.testing.assert_close(found, (base + 0.75 * reward).log_softmax(0), rtol=1e-4, atol=1e-4)
    else:
        gap = (found - base)[0] - (found - base)[1]
        assert gap.item() == pytest.approx((1 / (1 + math.exp(-2.0)) - 0.5) / 0.3, rel=1e-4)


def test_repeated_rebel_follows_exponentiated_rewards_to_the_best_response():
    """Takes three updates on all pairs; in each the sampler is the policy after the previous update. The result must be
    (initial policy) * exp(3 eta r) / Z."""
    cfg, reward = pairs_config(**SETTINGS["rebel"]), torch.tensor([1.0, -1.0, 0.5, 2.0])
    start = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    ends = [(a, b) for a in range(4) for b in range(a)]
    tokens = torch.tensor(ends).flatten()
    cu_rows, mask = torch.arange(len(tokens) + 1, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool)
    sampler = start
    for _ in range(3):
        logits = sampler.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure(logits=logits, sampler=sampler, optimizer=optimizer):
            optimizer.zero_grad()
            logprob = logits.log_softmax(0)[tokens]
            loss, _ = loss_of_pairs(cfg, logprob, sampler[tokens], reward[tokens], mask, cu_rows, len(ends))
            loss.backward()
            return loss

        optimizer.step(closure)
        sampler = logits.detach().log_softmax(0)
    torch.testing.assert_close(sampler, (start + 3 * 0.75 * reward).log_softmax(0), rtol=1e-3, atol=1e-3)
    assert sampler.argmax() == 3


@pytest.mark.parametrize(("select", "size"), [("neighbours", 2), ("best_worst", 4)])
def test_refuel_regresses_the_suffixes_of_pairs_that_start_inside_a_response(paths, select, size):
    """Compares the gradient of an update on shared prefixes with plain forwards of one text at a time. D is the
    difference of the log-ratios, summed over sampled tokens only. `best_worst` compares the best and the worst response
    of each group."""
    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"]},
        GRPOConfig,
        **{"update": "pair", "pair_select": select, "pair_eta": 0.5, "reset_prob": 1.0, "num_generations": size},
        **{"missing_eos_penalty": None, "num_ppo_epochs": 1, "kl_coef": 0.0},
    )
    policy = load_policy(cfg.model_name_or_path)
    prefixes = draw_prefixes(cfg, tokenized(12 // size), 0)
    rollouts = make_engine(cfg, policy, tiny.EOS).generate(prefixes)
    assert sum(prefix.num_reset > 0 for prefix in prefixes) >= 6
    scores = torch.linspace(-1, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    packs = pack_episodes(cfg, rollouts, list(range(12 // size)), policy.device)
    experience, _ = score_episodes(cfg, policy, frozen_copy(policy), None, rollouts, scores, packs, tiny.EOS)
    recorder = GradientRecorder(policy)
    metrics = update_pairs(cfg, policy, recorder, rollouts, experience, packs, (0, 0))
    pairs = [sorted(range(first, first + size), key=lambda i: scores[i]) for first in range(0, 12, size)]
    losses = []
    for worse, *_, better in pairs:
        margin = 0.0
        for index, sign in ((better, 1), (worse, -1)):
            prefix, sampled = rollouts[index].prefix.token_ids, rollouts[index].completion
            logits = policy(torch.tensor([[*prefix, *sampled]])).logits[0] / cfg.temperature
            at = range(len(prefix) - 1, len(prefix) + len(sampled) - 1)
            logprob = sum(logits[i].log_softmax(-1)[token] for i, token in zip(at, sampled, strict=True))
            margin = margin + sign * (logprob - logprob.detach())
        losses.append((margin - 0.5 * (scores[better] - scores[worse])) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert metrics["loss/policy_avg"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, parameter in zip(recorder.steps[0][0], policy.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=2e-6 * scale + 1e-9)


@pytest.mark.parametrize(("kind", "select"), [("rebel", "neighbours"), ("dpo", "best_worst"), ("ipo", "neighbours")])
def test_the_policy_learns_from_pairs_of_its_rollouts(paths, kind, select):
    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"]},
        GRPOConfig,
        **{"update": "pair", "pair_select": select, "num_ppo_epochs": 2} | SETTINGS[kind],
        **{"max_steps": 10, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "num_generations": 4},
        **{"missing_eos_penalty": None, "micro_batch_tokens": 400},
    )
    history = train_ppo(cfg, tiny.examples(24), reward_functions={"short": lambda r: -float(len(r.completion))}).history
    lengths = [row["completions/mean_length"] for row in history]
    assert sum(lengths[-3:]) / 3 < sum(lengths[:2]) / 2 - 0.5
    assert history[0]["pair/return_difference"] > 0
    if kind == "rebel":
        assert history[0]["grad_norm"] > 0


def test_the_first_pass_of_rebel_starts_at_the_sampler(paths):
    """D is 0 in the first pass, so the loss is the mean of (eta (r - r'))^2."""
    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"]},
        GRPOConfig,
        **{"update": "pair", "pair_eta": 2.0, "max_steps": 1, "num_generations": 2, "missing_eos_penalty": None},
    )
    (row,) = train_ppo(cfg, tiny.examples(8), reward_functions={"one": lambda r: float(r.completion[0] % 2)}).history
    assert row["pair/margin"] == 0
    assert row["loss/policy_avg"] == pytest.approx(4 * row["pair/return_difference"], rel=1e-6)  # r - r' is 0 or 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"advantage_estimator": "gae"},
            "advantage_estimator: must be rloo, grpo or opo with update pair, which has no",
        ),
        (
            {"num_generations": 3, "per_device_train_batch_size": 6},
            "num_generations: must be even with update pair and pair_select neighbours",
        ),
        ({"share_trunks": False}, "share_trunks: must be true with update pair"),
        ({"kl_placement": "loss", "kl_estimator": "k3"}, "kl_placement: must be reward with update pair"),
        ({"cliprange": 0.1}, "cliprange: must be 0.2 with update pair, since it would have no effect"),
        ({"update": "clipped", "pair_eta": 2.0}, "pair_eta: must be 1.0 when update is clipped, since it"),
        ({"pair_loss": "dpo", "pair_eta": 2.0}, "pair_eta: must be 1.0 when pair_loss is not rebel, since it"),
        ({"pair_beta": 0.2}, "pair_beta: must be 0.1 when pair_loss is rebel, since it would have no effect"),
    ],
)
def test_options_that_pair_losses_do_not_support_are_refused(settings, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        replace(pairs_config(), **settings)
