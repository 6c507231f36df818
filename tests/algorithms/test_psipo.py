"""Tests every PsiPO back-end against the closed form, by exact enumeration in float64.

The example has five actions and seven equally likely cards, each of which carries one action; this defines mu. All
draws of K cards are equally likely, so the mean over all draws is the population loss.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastrlhf.algorithms.psipo import (
    dataset_opponents,
    examined,
    group_loss,
    group_rewards,
    group_target,
    label_probability,
    load_psi,
    pair_target,
    psi_judge,
    reward_preferences,
)
from fastrlhf.types import Prefix, Rollout, TokenizedExample
from fastrlhf_kernels import pair_loss

TAU = 0.5
CARDS = torch.tensor([0, 1, 1, 2, 2, 3, 4])
MU = CARDS.bincount().double() / 7
REFERENCE = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([0.8, -0.3, 0.5, -1.2, 0.1], dtype=torch.float64)
BRADLEY_TERRY = reward_preferences(REWARDS)
CYCLES = torch.tensor(  # the cycle 0 > 3 > 1 > 2 > 4 > 0, which no reward function can explain
    [
        [0.5, 0.8, 0.6, 0.9, 0.3],
        [0.2, 0.5, 0.7, 0.4, 0.6],
        [0.4, 0.3, 0.5, 0.8, 0.9],
        [0.1, 0.6, 0.2, 0.5, 0.35],
        [0.7, 0.4, 0.1, 0.65, 0.5],
    ],
    dtype=torch.float64,
)


def tanh(q):
    return torch.tanh(3 * (q - 0.5))


def square(q):
    return q**2


def psis() -> dict:
    named = {name: load_psi(name, 1.0) for name in ("identity", "logit", "clipped_logit")}
    return named | {f.__name__: examined(f, f.__name__) for f in (tanh, square)}


PSIS = psis()
ODD = [name for name in PSIS if name != "square"]


def closed_form(psi, preference=CYCLES) -> torch.Tensor:
    """Returns the optimal policy pi_ref exp(g / tau) / Z of eq. 7 and 9."""
    return (REFERENCE.log() + (psi(preference) @ MU) / TAU).softmax(0)


def minimiser(loss) -> torch.Tensor:
    """Returns the policy at the minimum of `loss`, which must be quadratic in the log-ratios, by one Newton step."""
    points = [torch.zeros(5, dtype=torch.float64), *torch.eye(5, dtype=torch.float64)]
    start, *shifted = (torch.autograd.grad(loss(u), u)[0] for u in map(torch.Tensor.requires_grad_, points))
    hessian = torch.stack(shifted) - start
    return (REFERENCE.log() - torch.linalg.pinv(hessian, rtol=1e-10) @ start).softmax(0)


def error(policy, psi, preference=CYCLES) -> float:
    return (policy - closed_form(psi, preference)).abs().max().item()


def groupwise_minimiser(size: int, target) -> torch.Tensor:
    """Returns the minimiser of `group_loss` over all draws of `size` cards. `target` maps the preferences [draws, K, K]
    within each draw to the targets [draws, K]."""
    draws = CARDS[torch.cartesian_prod(*[torch.arange(7)] * size)]
    targets = target(CYCLES[draws[:, :, None], draws[:, None, :]]).flatten()
    cu_groups = torch.arange(0, draws.numel() + 1, size)

    def loss(u):
        # The metrics compare all pairs of members, so a few groups at a time keep the memory small.
        parts = zip(draws.split(30), targets.split(30 * size), strict=True)
        return sum(group_loss(u[d].flatten(), t, cu_groups[: len(d) + 1], num_groups=len(draws)).loss for d, t in parts)

    return minimiser(loss)


def test_the_closed_form_maximises_the_objective():
    psi, best = PSIS["square"], closed_form(PSIS["square"])

    def objective(logits):
        log_policy = logits.log_softmax(0)
        gain = log_policy.exp() @ psi(CYCLES) @ MU
        return gain - TAU * (log_policy.exp() * (log_policy - REFERENCE.log())).sum()

    logits = best.log().requires_grad_()
    value = objective(logits)
    value.backward()
    assert logits.grad.abs().max() < 1e-15
    with torch.no_grad():
        assert all(objective(logits + 0.1 * shift) < value for shift in torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("preference", [CYCLES, BRADLEY_TERRY], ids=["cycles", "bradley_terry"])
@pytest.mark.parametrize("name", ODD)
def test_pairs_reach_the_closed_form_if_psi_is_odd(name, preference):
    """Minimises `pair_loss` over all ordered pairs of cards. The tolerance is that of its float32 arithmetic."""
    psi = PSIS[name]
    pairs = CARDS[torch.cartesian_prod(torch.arange(7), torch.arange(7))]  # [49, 2]
    target = pair_target(psi, preference[pairs[:, 0], pairs[:, 1]], TAU)
    cu_seqlens, mask = torch.arange(99), torch.ones(98, dtype=torch.bool)
    log_ratio = torch.zeros(5, requires_grad=True)
    sequences = log_ratio[pairs].flatten()
    loss = pair_loss(sequences, None, cu_seqlens, mask, num_pairs=49, kind="ipo", beta=TAU, target=target).loss
    loss.backward()
    # The Hessian of the mean of (u_i - u_j)^2 over pairs; it does not depend on the target.
    hessian = 4 * (MU.diag() - torch.outer(MU, MU))
    policy = (REFERENCE.log() - torch.linalg.pinv(hessian) @ log_ratio.grad.double()).softmax(0)
    assert error(policy, psi, preference) < 2e-7


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ODD)
def test_groups_that_include_the_response_itself_reach_the_closed_form_if_psi_is_odd(name, size):
    psi = PSIS[name]
    policy = groupwise_minimiser(size, lambda p: group_target(p, psi, TAU, "self_included"))
    assert error(policy, psi) < 1e-12


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", PSIS)
def test_groups_that_leave_two_out_reach_the_closed_form_for_any_psi(name, size):
    psi = PSIS[name]
    policy = groupwise_minimiser(size, lambda p: group_target(p, psi, TAU, "leave_two_out"))
    assert error(policy, psi) < 1e-12


def test_back_ends_that_are_refused_for_a_psi_that_is_not_odd_would_be_wrong():
    psi = PSIS["square"]
    pairwise = groupwise_minimiser(2, lambda p: psi(p).mean(-1) / TAU)  # at K = 2 this is the pairwise target
    included = groupwise_minimiser(3, lambda p: psi(p).mean(-1) / TAU)
    assert error(pairwise, psi) > 0.004
    assert 0.001 < error(included, psi) < error(pairwise, psi)
    with pytest.raises(ValueError, match=r"square is not odd about 1/2 .* use psi_backend groupwise"):
        pair_target(psi, torch.tensor([0.7]), TAU)
    with pytest.raises(ValueError, match="self_included is biased, use leave_two_out"):
        group_target(CYCLES, psi, TAU, "self_included")
    with pytest.raises(ValueError, match="needs at least 3 responses per prompt; got 2"):
        group_target(CYCLES[:2, :2], psi, TAU, "leave_two_out")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_excluding_the_response_itself_would_inflate_every_target(size):
    psi = PSIS["identity"]

    def excluded(p):
        return (psi(p).sum(-1) - 0.5) / (size - 1) / TAU

    policy = groupwise_minimiser(size, excluded)
    g = CYCLES @ MU
    inflated = (REFERENCE.log() + size / (size - 1) * g / TAU).softmax(0)
    torch.testing.assert_close(policy, inflated, rtol=0, atol=1e-12)
    assert error(policy, psi) > 0.02


@pytest.mark.parametrize("name", PSIS)
def test_the_reward_of_the_reward_backend_is_g(name):
    psi = PSIS[name]
    g = group_rewards(CYCLES[CARDS[:, None], CARDS[None]], psi)  # because mu is uniform over the cards
    policy = (REFERENCE.log()[CARDS] + g / TAU).softmax(0)
    by_action = torch.stack([policy[a == CARDS].mean() for a in range(5)])
    assert error(by_action / by_action.sum(), psi) < 1e-14


def dpo_minimiser(preference) -> torch.Tensor:
    """Returns the minimiser of DPO's population loss (beta = tau), which is convex, by Newton's method."""

    def loss(u):
        return (preference * weights * F.softplus(-TAU * (u[:, None] - u[None]))).sum()

    weights, u = torch.outer(MU, MU), torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, u)
        u = u - torch.linalg.pinv(torch.autograd.functional.hessian(loss, u), rtol=1e-10) @ gradient
    assert gradient.abs().max() < 1e-15
    return (REFERENCE.log() + u).softmax(0)


def test_under_bradley_terry_dpo_rlhf_and_psipo_with_logit_are_equal():
    """Tests proposition 1 of the paper. If preferences are not Bradley-Terry, DPO and PsiPO with logit have different
    optima."""
    rlhf = (REFERENCE.log() + REWARDS / TAU).softmax(0)
    torch.testing.assert_close(closed_form(PSIS["logit"], BRADLEY_TERRY), rlhf, rtol=0, atol=1e-14)
    torch.testing.assert_close(dpo_minimiser(BRADLEY_TERRY), rlhf, rtol=0, atol=1e-12)
    assert error(dpo_minimiser(CYCLES), PSIS["logit"]) > 0.01


def test_a_pair_is_a_group_of_two():
    p = torch.tensor([0.9, 0.25, 0.5], dtype=torch.float64)
    preference = torch.stack([torch.stack([0.5 + 0 * p, p], -1), torch.stack([1 - p, 0.5 + 0 * p], -1)], -2)
    for name in ODD:
        target = group_target(preference, PSIS[name], TAU, "self_included")
        torch.testing.assert_close(
            (target[:, 0] - target[:, 1]).float(), pair_target(PSIS[name], p, TAU), rtol=1e-6, atol=1e-7
        )


def test_pair_targets_by_hand():
    target = pair_target(PSIS["identity"], torch.tensor([1.0, 0.75, 0.5]), 0.1)
    assert target.tolist() == pytest.approx([5, 2.5, 0])  # 1 / (2 tau), (p - 1/2) / tau
    assert pair_target(PSIS["logit"], torch.tensor([0.8]), 2.0).item() == pytest.approx(0.6931472)  # ln 4 / tau
    clipped = pair_target(PSIS["clipped_logit"], torch.tensor([0.99, 0.6]), 0.5).tolist()
    assert clipped == pytest.approx([2.0, 0.8109302])  # 1 / tau, ln 1.5 / tau
    assert target.dtype == torch.float32


def test_logit_of_a_certain_preference_is_refused_and_never_clipped():
    with pytest.raises(ValueError, match=r"logit of the probability 1 is not finite, so .* use clipped_logit"):
        pair_target(PSIS["logit"], torch.tensor([0.8, 1.0]), TAU)
    with pytest.raises(ValueError, match="logit of the probability 0 is not finite"):
        group_target(torch.tensor([[0.5, 0.0], [1.0, 0.5]]), PSIS["logit"], TAU, "self_included")


def test_one_hard_label_per_pair_needs_an_affine_psi():
    hard = torch.tensor([1.0, 0.0, 1.0])
    for name in ("logit", "clipped_logit", "tanh"):
        with pytest.raises(ValueError, match=f"{name} needs probabilities, and every label is hard"):
            pair_target(PSIS[name], hard, TAU)
    assert pair_target(examined(lambda q: 3 * q - 1, "line"), hard, TAU).tolist() == pytest.approx([3, -3, 3])
    assert pair_target(PSIS["tanh"], torch.tensor([1.0, 0.9]), TAU)[0] > 0  # not all probabilities are 0 or 1


def test_smoothed_probabilities_by_hand():
    wins, labels = torch.tensor([1, 0, 3, 0]), torch.tensor([1, 1, 4, 0])
    # Smoothed: (wins + 1/2) / (labels + 1)
    assert label_probability(wins, labels).tolist() == [0.75, 0.25, 0.7, 0.5]
    assert label_probability(wins[:3], labels[:3], 0.0).tolist() == [1, 0, 0.75]
    with pytest.raises(ValueError, match="a pair without labels has no probability"):
        label_probability(wins, labels, 0.0)
    with pytest.raises(ValueError, match=r"wins: must be in 0\.\.labels"):
        label_probability(torch.tensor([2]), torch.tensor([1]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.logit, r"mine is not finite at 0, .* clip it, as clipped_logit"),
        (lambda q: (q - 0.3).abs(), r"mine must be non-decreasing; it falls from 0 to 0\.001"),
        (lambda q: q.sum(), r"mine must return a tensor of the shape of its argument, \(1001,\)"),
    ],
)
def test_an_invalid_psi_function_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        examined(function, "mine")


def test_symmetry_and_straightness_are_measured():
    measured = {name: (PSIS[name].is_odd, PSIS[name].is_affine) for name in ("tanh", "square")}
    assert measured == {"tanh": (True, False), "square": (False, False)}
    line = examined(lambda q: 100 + 1e-3 * q, "line")
    assert (line.is_odd, line.is_affine) == (True, True)
    single = examined(lambda q: 3 * (q.float() - 0.5).sinh(), "in float32")
    assert (single.is_odd, single.is_affine) == (True, False)
    assert examined(lambda q: 0.1 * q.float(), "in float32").is_affine
    assert not examined(lambda q: q.float() + 1e-4 * q.float() ** 2, "in float32").is_odd
    for name in ("identity", "clipped_logit"):  # the declared properties equal the measured ones
        again = examined(PSIS[name].function, name)
        assert (again.is_odd, again.is_affine) == (PSIS[name].is_odd, PSIS[name].is_affine)


def test_a_psi_is_found_by_module_or_file(tmp_path):
    (tmp_path / "mine.py").write_text("def half(q):\n    return q / 2\n")
    assert load_psi(f"{tmp_path / 'mine.py'}:half", 1.0)(torch.tensor([0.5])).item() == 0.25
    assert load_psi("torch:tanh", 1.0).is_odd is False
    for name, reason in (("torch:nothing", "has no function"), ("no_such_module:f", "No module named")):
        with pytest.raises(ValueError, match=f"^psi: .*{reason}"):
            load_psi(name, 1.0)
    with pytest.raises(
        ValueError, match=r"^psi: 'logits' is unknown; give identity, logit, clipped_logit or module:function"
    ):
        load_psi("logits", 1.0)


def test_the_group_loss_is_the_mean_over_pairs_and_its_gradient_the_finite_differences():
    generator = torch.Generator().manual_seed(0)
    u, t = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    cu_groups, bounds = torch.tensor([0, 2, 6, 9]), [(0, 2), (2, 6), (6, 9)]

    def pairs(u):
        groups = [list(itertools.combinations(range(a, b), 2)) for a, b in bounds]
        return sum(sum((u[i] - u[j] - t[i] + t[j]) ** 2 for i, j in group) / len(group) for group in groups) / 5

    u.requires_grad_()
    output = group_loss(u, t, cu_groups, num_groups=5)
    torch.testing.assert_close(output.loss, pairs(u), rtol=1e-12, atol=0)
    assert output.metrics["loss"].value.item() == pytest.approx(5 * output.loss.item())
    assert torch.autograd.gradcheck(lambda u: group_loss(u, t, cu_groups, num_groups=5).loss, u, atol=1e-8)


@pytest.mark.parametrize("name", PSIS)
def test_leave_two_out_has_the_gradient_of_its_definition(name):
    """By definition the target of the pair (i, j) is the mean of M_il - M_jl over all other members l, with M =
    Psi(P)."""
    value, size = PSIS[name](CYCLES), 5
    u = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.combinations(range(size), 2):
        others = [k for k in range(size) if k not in (i, j)]
        loss = loss + ((u[i] - u[j]) - (value[i, others] - value[j, others]).mean() / TAU) ** 2
    (expected,) = torch.autograd.grad(loss / 10, u)
    target = group_target(CYCLES, PSIS[name], TAU, "leave_two_out")
    (gradient,) = torch.autograd.grad(group_loss(u, target, torch.tensor([0, 5]), num_groups=1).loss, u)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


def test_metrics_are_over_the_pairs_that_differ_in_target():
    u, t = torch.tensor([1.0, 3.0, 2.0, 0.0, 4.0]), torch.tensor([2.0, 1.0, 0.0, 5.0, 5.0])
    metrics = group_loss(u, t, torch.tensor([0, 3, 5]), num_groups=2).metrics
    values = {name: metric.value.item() for name, metric in metrics.items()}
    assert values["groups"] == 2
    assert values["ordered"] == 1  # the targets of the second group are equal
    assert values["accuracy"] == pytest.approx(1 / 3)  # of 0 > 1, 0 > 2, 1 > 2 only the last is right
    assert values["margin"] == pytest.approx((-2 - 1 + 1) / 3)
    assert values["target_margin"] == pytest.approx((1 + 2 + 1) / 3)


def rollout(action: int, prompt=(7, 8), row: int = 0, num_reset: int = 0) -> Rollout:
    prefix = Prefix(token_ids=[*prompt, *[9] * num_reset], num_reset=num_reset, row=row, episode=0)
    return Rollout(prefix=prefix, completion=[action], sampler_logprob=[0.0], ended=True)


def judge(rollouts):
    return REWARDS[[r.completion[0] for r in rollouts]].float()


@pytest.mark.parametrize("name", ["identity", "square"])
def test_a_judge_compares_with_the_opponents_of_its_prompt(name):
    psi = PSIS[name]
    opponents = [rollout(int(card)) for card in CARDS] + [rollout(0, prompt=(5,))]
    rollouts = [rollout(a, num_reset=a % 2) for a in range(5)] + [rollout(2, prompt=(5,))]
    rewards = psi_judge(judge, opponents, psi)(rollouts)
    g = psi(reward_preferences(REWARDS.float())) @ MU
    torch.testing.assert_close(rewards[:5], g.float())
    assert rewards[5].item() == pytest.approx(psi(BRADLEY_TERRY[2, 0]).item())
    with pytest.raises(ValueError, match="the prompt of row 3 has no response to compare with"):
        psi_judge(judge, opponents, psi)([rollout(1, prompt=(6,), row=3)])


def test_without_opponents_the_reward_of_a_rollout_is_unbiased():
    """If rollouts are sampled from mu, the mean reward of an action over all draws of three rollouts equals g."""
    rewards = {a: [] for a in range(5)}
    judged = psi_judge(judge, None, PSIS["square"])
    for draw in itertools.product(CARDS.tolist(), repeat=3):
        for action, reward in zip(draw, judged([rollout(a) for a in draw]).tolist(), strict=True):
            rewards[action].append(reward)
    g = PSIS["square"](BRADLEY_TERRY) @ MU
    assert [sum(r) / len(r) for r in rewards.values()] == pytest.approx(g.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="the prompt of row 0 has no response to compare with"):
        judged([rollout(1), rollout(1, prompt=(6,), row=2)])


def test_opponents_are_all_responses_of_an_example():
    pair = TokenizedExample(prompt=[7, 8], chosen=[1], reference=[3], row=4)
    group = TokenizedExample(prompt=[9], responses=[[1], [2]], row=5)
    opponents = dataset_opponents([pair, group])
    assert [(r.prefix.token_ids, r.completion) for r in opponents] == [
        ([7, 8], [1]),
        ([7, 8], [3]),
        ([9], [1]),
        ([9], [2]),
    ]
