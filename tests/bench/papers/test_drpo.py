"""Tests of the tabular DR-PO experiments: closed forms against optimisers, and the effect of resets on a lock."""

import json
import math

import pytest
import torch

from bench.papers import drpo
from bench.papers.drpo import (
    action_values,
    direct_step,
    episodes_to_solve,
    mirror_descent,
    npg_step,
    objective,
    optimum,
    random_mdp,
)


@pytest.mark.parametrize(("lam", "eta"), [(0.1, 1.0), (2.0, 0.3), (0.0, 5.0), (1.0, 1e3)])
def test_the_closed_form_equals_the_numerical_optimum(lam, eta):
    """The tolerance is 1e-6, because the objective is flat at its optimum: a numerical optimum in float64 is only
    accurate to the square root of the float64 precision."""
    mdp = random_mdp(0)
    sft = mdp.log_sft.repeat(mdp.horizon, 1, 1)
    old = torch.randn(sft.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    q = action_values(mdp, old, 0.0)
    closed, direct = (step(q, sft, old, lam=lam, eta=eta) for step in (npg_step, direct_step))
    torch.testing.assert_close(closed.exp(), direct.exp(), rtol=0, atol=1e-6)
    assert (closed.exp() - old.exp()).abs().max() > 0.1


def test_small_eta_keeps_the_old_policy_and_large_eta_forgets_it():
    mdp = random_mdp(1)
    sft = mdp.log_sft.repeat(mdp.horizon, 1, 1)
    old = torch.randn(sft.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    q = action_values(mdp, old, 0.0)
    torch.testing.assert_close(npg_step(q, sft, old, lam=0.5, eta=0.0), old, rtol=0, atol=1e-12)
    far = (sft + q / 0.5).log_softmax(-1)
    torch.testing.assert_close(npg_step(q, sft, old, lam=0.5, eta=1e12), far, rtol=0, atol=1e-9)


def test_the_soft_optimum_is_better_than_every_policy_near_it():
    mdp = random_mdp(2)
    best = optimum(mdp, 0.1)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 3.0):
        other = (best + size * torch.randn(best.shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
        assert objective(mdp, other, 0.1) < objective(mdp, best, 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_mirror_descent_reaches_the_optimum_only_if_q_includes_the_later_kl(seed):
    mdp = random_mdp(seed)
    sft = mdp.log_sft.repeat(mdp.horizon, 1, 1)
    best = optimum(mdp, 0.1)
    with_kl, without = (mirror_descent(mdp, lam=0.1, eta=1.0, steps=400, kl_in_q=kl) for kl in (True, False))
    # 400 steps reduce the distance by a factor of 1.1^400 = 4e16.
    torch.testing.assert_close(with_kl.exp(), best.exp(), rtol=0, atol=1e-9)
    fixed = (sft + action_values(mdp, without, 0.0) / 0.1).log_softmax(-1)
    torch.testing.assert_close(without.exp(), fixed.exp(), rtol=0, atol=1e-9)
    assert objective(mdp, without, 0.1) < objective(mdp, best, 0.1) - 1e-4


def test_every_step_of_exact_mirror_descent_improves_the_policy():
    mdp = random_mdp(3)
    values = [objective(mdp, mirror_descent(mdp, lam=0.1, eta=1.0, steps=n, kl_in_q=True), 0.1) for n in range(6)]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.1


def test_without_resets_the_episodes_grow_like_the_number_of_combinations():
    """The number of episodes until the first success has a geometric distribution with mean 2^H. The mean of 64 seeds
    deviates by less than 50 % (four standard errors). Learning after the first success takes a few more batches.
    """
    for horizon in (8, 10):
        episodes = episodes_to_solve(horizon, None, 64).mean()
        assert 0.5 * 2**horizon < episodes < 1.5 * 2**horizon + 3 * drpo.BATCH


def test_resets_to_right_responses_need_polynomially_many_episodes():
    right = {horizon: episodes_to_solve(horizon, 1.0, 8).median() for horizon in (8, 16, 32)}
    assert right[32] < 32**2 * 4 < 2**32
    assert right[32] / right[16] < 8  # twice the length needs less than 2^3 times the episodes
    own = episodes_to_solve(12, 0.5, 8).median()
    assert own > 5 * episodes_to_solve(12, 1.0, 8).median()


def test_q_is_the_mean_return_over_visits():
    visits = torch.tensor([[[True, True], [True, False], [False, False]]])
    opened = torch.tensor([[[True], [False], [True]]])
    assert drpo._mean_return(visits, opened).tolist() == [[0.5, 1.0]]


def test_unsolved_locks_are_reported_as_inf(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drpo, "HORIZONS", (2, 4, 40, 48))
    monkeypatch.setattr(drpo, "SEEDS", 3)
    monkeypatch.setattr(drpo, "MAX_EPISODES", 640)
    assert episodes_to_solve(40, None, 2, 640).tolist() == [math.inf] * 2
    lines = drpo.run_lock(tmp_path, fast=False).splitlines()
    assert lines[4].startswith("| 40 | inf [inf, inf] |")
    assert len(lines) == 5  # length 40 was not solved, so 48 is not tried
    (file,) = (tmp_path / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["resets"] for row in rows] == list(drpo.GIVEN)
    assert rows[0]["episodes"]["40"] == [None] * 3
    assert (tmp_path / "figures/drpo_lock.png").read_bytes().startswith(b"\x89PNG")
