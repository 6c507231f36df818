"""Tests of the RTO experiments on token trees, against enumeration of all responses, in float64."""

import json
import math

import pytest
import torch

from bench.papers import rto
from bench.papers.rto import (
    ACTIONS,
    BOUND,
    HORIZON,
    NUM_FEATURES,
    NUM_RESPONSES,
    RHOS,
    draw_problems,
    evaluate,
    fit_reward,
    pessimism,
    plan,
    response_features,
    uniform_policy,
    visits,
)
from fastrlhf.rewards.terms import shaped

FEATURES = response_features()


def tree(seed: int, *kinds: str) -> list[torch.Tensor]:
    """Draws random token rewards or log-probs of a policy for all cells of a tree; returns one tensor [features] per
    kind."""
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randn(NUM_FEATURES, generator=generator, dtype=torch.float64) for _ in kinds]
    return [policy(x) if kind == "policy" else x for kind, x in zip(kinds, cells, strict=True)]


def policy(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([level.log_softmax(-1).flatten() for level in rto.levels(logits)])


def test_a_response_is_one_token_per_level_and_no_two_share_all():
    assert FEATURES.sum(1).tolist() == [HORIZON] * NUM_RESPONSES
    assert len(FEATURES.unique(dim=0)) == NUM_RESPONSES
    uniform = uniform_policy()
    torch.testing.assert_close(FEATURES @ uniform, torch.full((27,), -math.log(27), dtype=torch.float64))
    assert visits(uniform).unique().allclose(torch.tensor([1 / 27, 1 / 9, 1 / 3], dtype=torch.float64))


def test_soft_value_iteration_is_the_gibbs_policy_over_whole_responses():
    """Theorem 1: pi(y) = pi_ref(y) exp(r(y) / beta) / Z and V(s_1) = beta log Z, so sum beta log(pi / pi_ref) = r -
    V(s_1)."""
    reward, reference = tree(0, "reward", "policy")
    best, value = plan(reward, reference, beta=0.3)
    weight = FEATURES @ (reference + reward / 0.3)
    torch.testing.assert_close(FEATURES @ best, weight.log_softmax(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(value, 0.3 * weight.logsumexp(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(0.3 * (FEATURES @ (best - reference)), FEATURES @ reward - value, rtol=0, atol=1e-12)


def test_the_value_of_a_policy_is_its_mean_over_responses_and_at_most_the_optimum():
    reward, reference, other = tree(1, "reward", "policy", "policy")
    best, value = plan(reward, reference, beta=0.3)
    for candidate in (best, other, reference):
        written = (FEATURES @ candidate).exp()
        expected = written @ (FEATURES @ (reward - 0.3 * (candidate - reference)))
        torch.testing.assert_close(evaluate(candidate, reward, reference, 0.3), expected, rtol=1e-12, atol=0)
    assert evaluate(best, reward, reference, 0.3) == pytest.approx(float(value), rel=1e-12)
    assert evaluate(other, reward, reference, 0.3) < value - 0.01


def test_the_optimum_of_rto_extrapolates_beyond_the_dpo_model():
    """Theorem 2: pi(y) ~ pi_ref (pi_dpo / pi_ref)^(beta1 / beta2) exp(beta3 score / beta2).

    This is the DPO model itself if beta1 = beta2 and beta3 = 0.
    """
    dpo, reference = tree(2, "policy", "policy")
    score = torch.zeros(NUM_FEATURES, dtype=torch.float64)
    score[-NUM_RESPONSES:] = tree(3, "reward")[0][-NUM_RESPONSES:]  # the score is paid at the last token
    for beta1, beta2, beta3 in ((0.05, 0.01, 0.1), (0.3, 0.1, 1.0), (0.1, 0.1, 0.0)):
        best, _ = plan(beta1 * (dpo - reference) + beta3 * score, reference, beta2)
        expected = FEATURES @ (reference + beta1 / beta2 * (dpo - reference) + beta3 / beta2 * score)
        torch.testing.assert_close(FEATURES @ best, expected.log_softmax(0), rtol=0, atol=1e-11)
    torch.testing.assert_close(best, dpo, rtol=0, atol=1e-12)


def test_token_sentence_and_eos_rewards_share_an_optimum_and_rs_has_that_of_the_score():
    """Tests theorem 3 with the reward shaping of the trainer. Token 0 ends a sentence."""
    dpo, reference, score = tree(4, "policy", "policy", "reward")
    score[:-NUM_RESPONSES] = 0
    token = 0.3 * (dpo - reference)
    cells = FEATURES.nonzero()[:, 1]  # [responses * HORIZON], response after response
    position = torch.arange(len(cells)) % HORIZON
    ends = position == HORIZON - 1
    sentence_ends = ends | (cells % ACTIONS == 0)
    best = {}
    for shaping in ("token", "sentence", "eos", "rs", "none"):
        paid = torch.zeros(NUM_FEATURES, dtype=torch.float64)
        # Responses that share a cell of the tree (a prefix and its next token) have equal rewards in this cell
        paid[cells] = shaped(token[cells], shaping, ends, sentence_ends)
        best[shaping], _ = plan(paid + score, reference, beta=0.1)
        if shaping in ("sentence", "eos"):
            assert not torch.equal(paid, token)
    for shaping, same in (("sentence", "token"), ("eos", "token"), ("rs", "none")):
        torch.testing.assert_close(best[shaping], best[same], rtol=0, atol=1e-12)
    assert (best["token"] - best["none"]).abs().max() > 0.1


def test_the_fit_meets_the_conditions_of_the_constrained_maximum():
    """At a constrained maximum on the sphere the gradient is parallel to theta and points outwards; inside the ball it
    is 0."""
    problems = draw_problems("good", 200, 4)
    pairs = problems.wins.sum((-2, -1)).unsqueeze(-1)
    for bound, binds in ((2.0, True), (1e3, False)):
        # Without an active bound the likelihood has a finite maximum only if both sides win every pair at least once
        wins = problems.wins if binds else problems.wins + 1.0
        theta = fit_reward(wins, bound).requires_grad_()
        total = theta @ FEATURES.T
        margin = total.unsqueeze(-1) - total.unsqueeze(-2)
        likelihood = (wins * torch.nn.functional.logsigmoid(margin)).sum((-2, -1))
        (gradient,) = torch.autograd.grad(likelihood.sum(), theta)
        gradient = gradient / pairs
        norm = theta.detach().norm(dim=-1, keepdim=True)
        outwards = (gradient * theta.detach() / norm).sum(-1, keepdim=True)
        # A gradient that should be 0 is about 1e-6 after the fit; the gradient at theta = 0 is of order 1.
        torch.testing.assert_close(gradient, outwards * theta.detach() / norm, rtol=0, atol=1e-6)
        assert (norm.allclose(torch.tensor(bound, dtype=torch.float64)) and bool((outwards > 0).all())) == binds
        assert binds or outwards.abs().max() < 1e-6


def test_pairs_of_equal_responses_give_theta_0():
    wins = torch.zeros(1, NUM_RESPONSES, NUM_RESPONSES, dtype=torch.float64)
    wins[0, 4, 4] = 50
    assert not fit_reward(wins, BOUND).any()


def test_the_covariance_does_not_depend_on_who_won():
    problems = draw_problems("blind", 5, 1)
    expected = rto.RIDGE * torch.eye(NUM_FEATURES, dtype=torch.float64)
    for winner, loser in problems.wins[0].nonzero().tolist():
        difference = FEATURES[winner] - FEATURES[loser]
        expected += problems.wins[0, winner, loser] * torch.outer(difference, difference)
    torch.testing.assert_close(rto.covariance(problems.wins)[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rto.covariance(problems.wins.mT), rto.covariance(problems.wins), rtol=0, atol=1e-12)


@pytest.mark.parametrize("writers", rto.WRITERS)
def test_with_rho_equal_to_the_error_the_guarantee_holds_in_every_problem(writers):
    """Checks the theorem for theta* inside the ellipsoid: sub-optimality <= 2 rho E*[sum |phi|] - beta KL(pi* || pi).

    The bound is loose by two orders of magnitude, so the per-token inequality behind it is tested as well.
    """
    problems = draw_problems(writers, 200, 10)
    found = pessimism(problems)
    assert (found["error"] <= found["guarantee"]).all()
    assert (found["error"] >= 0).all()
    error = fit_reward(problems.wins, BOUND) - problems.theta
    norm = torch.linalg.inv(rto.covariance(problems.wins)).diagonal(dim1=-2, dim2=-1).sqrt()
    assert (error.abs() <= found["radius"].unsqueeze(-1) * norm * (1 + 1e-9)).all()


def test_pessimism_helps_if_the_data_cover_good_responses():
    """If the data contain good responses, pessimism lowers the sub-optimality by more than the width of its confidence
    interval."""
    gains = {}
    for writers in ("good", "bad"):
        found = pessimism(draw_problems(writers, 200, 40))
        gains[writers] = rto.mean_and_interval(found["10"] - found["0"])
    mean, half = gains["good"]
    assert mean + half < 0
    assert gains["bad"][0] > mean


def test_the_rho_of_the_theorem_lets_the_penalty_dominate():
    assert rto.theory_rho() > 1e8
    assert RHOS[-1] == math.inf


def test_a_full_run_writes_a_row_per_case_and_a_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rto, "PROBLEMS", 3)
    monkeypatch.setattr(rto, "FIT_STEPS", 5)
    table = rto.run_pessimism(tmp_path, fast=False)
    (file,) = (tmp_path / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(rto.WRITERS) * len(rto.NUM_PAIRS) == len(table.splitlines()) - 2
    assert {"0", "inf", "error", "reference"} <= set(rows[0]["mean"])
    assert (tmp_path / "figures/rto_pessimism.png").read_bytes().startswith(b"\x89PNG")
