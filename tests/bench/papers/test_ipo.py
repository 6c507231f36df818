"""Tests of the fast variant of `python -m bench papers ipo` (full batches, no randomness) against closed forms."""

import json
from math import exp

import pytest
import torch

from bench.papers.ipo import BANDITS, FAST_STEPS, KINDS, TAUS, Curves, ipo_minimiser, run_ipo, table, tournament, train

HALF_AND_BELOW = [i for i, tau in enumerate(TAUS) if tau <= 0.5]
ONE_AND_BELOW = [i for i, tau in enumerate(TAUS) if tau <= 1]
TWO_AND_ABOVE = [i for i, tau in enumerate(TAUS) if tau >= 2]


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Curves]]:
    bandits = [*BANDITS, tournament(4)]
    return {kind: train(bandits, kind, steps=FAST_STEPS, batch_size=None) for kind in KINDS}


def final(curves: Curves) -> torch.Tensor:
    """Returns the action probabilities after the last step of the first seed, [taus, actions]."""
    return curves.probs[-1, 0]


def by_hand(name: str, tau: float) -> list[float]:
    """Returns the optimal probabilities of a bandit by closed forms derived on paper, with t = 1 / (2 tau)."""
    t = 1 / (2 * tau)
    logits = {
        "two actions": [t, 0.0],
        "D1": [1 / (3 * tau), 0.0, -1 / (3 * tau)],
        "D2": [0.0, 0.0, 0.0],
        "D3 literal": [0.0, 0.0, 0.0],
        "D3b": [t, 0.0, -t],
        "D3c": [t, t, 0.0],
        "tournament of 4": [wins / (4 * tau) for wins in (3, 2, 1, 0)],
    }[name]
    weights = [exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("bandit", [*BANDITS, tournament(4)], ids=lambda bandit: bandit.name)
def test_ipo_ends_at_the_closed_form_for_every_tau(bandit, runs):
    expected = torch.tensor([by_hand(bandit.name, tau) for tau in TAUS])
    torch.testing.assert_close(final(runs["ipo"][bandit.name]), expected, rtol=0, atol=1e-3)
    minimiser = torch.stack([ipo_minimiser(bandit, tau) for tau in TAUS])
    torch.testing.assert_close(minimiser.float(), expected, rtol=0, atol=1e-6)  # `expected` is float32


@pytest.mark.parametrize("num_actions", [2, 3, 5])
def test_for_a_full_tournament_the_minimiser_is_the_population_optimum(num_actions):
    """Eq. 7 with Psi = identity: the optimum is pi_ref exp(p(y > mu) / tau) / Z, with uniform mu and p(y > y) = 1/2."""
    beats = torch.ones(num_actions, num_actions, dtype=torch.float64).triu(1) + 0.5 * torch.eye(num_actions)
    if num_actions == 2:
        assert beats.mean(1).tolist() == [0.75, 0.25]  # the values in the paper
    for tau in TAUS:
        expected = (beats.mean(1) / tau).softmax(-1)
        torch.testing.assert_close(ipo_minimiser(tournament(num_actions), tau), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["two actions", "D1", "D3b"])
def test_dpo_becomes_deterministic_at_small_tau_and_drifts_slowly_at_large_tau(name, runs):
    """DPO moves away from the reference without bound, but only logarithmically, because the gradient falls like
    exp(-beta D). For tau above 1, a run of this length shows only that the probability of the best action grows.
    """
    best = runs["dpo"][name].probs[:, 0, :, 0]  # [points, taus]
    assert best[-1, HALF_AND_BELOW].min() > 0.999
    assert best[-1, ONE_AND_BELOW].min() > 0.99  # after 18,000 steps above 0.999 (bench/LOG.md)
    assert (best[-1, TWO_AND_ABOVE] < 0.99).all()
    assert (best[1:, TWO_AND_ABOVE] > best[:-1, TWO_AND_ABOVE]).all()
    assert (final(runs["dpo"][name])[:, 0] > final(runs["ipo"][name])[:, 0]).all()


def test_dpo_takes_all_probability_from_a_losing_action_and_keeps_the_tie(runs):
    ends = final(runs["dpo"]["D3c"])
    # The gradients of tied actions cancel up to rounding errors, and Adam scales these errors up.
    torch.testing.assert_close(ends[:, 0], ends[:, 1], rtol=0, atol=1e-3)
    assert ends[ONE_AND_BELOW, 2].max() < 1e-3
    falling = runs["dpo"]["D3c"].probs[:, 0, TWO_AND_ABOVE, 2]
    assert (falling[1:] < falling[:-1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["D2", "D3 literal"])
def test_a_cycle_and_the_printed_d3_leave_both_methods_at_the_reference(name, kind, runs):
    torch.testing.assert_close(final(runs[kind][name]), torch.full((len(TAUS), 3), 1 / 3), rtol=0, atol=1e-5)


def test_training_bandits_together_changes_nothing_and_only_the_seed_sets_the_batches():
    together = train(BANDITS, "ipo", steps=100, batch_size=9, seeds=2)
    for bandit in BANDITS[:2]:
        alone = train([bandit], "ipo", steps=100, batch_size=9, seeds=3)[bandit.name]
        # Softmax over several bandits may sum in a different order, and Adam amplifies differences of small gradients.
        torch.testing.assert_close(together[bandit.name].probs, alone.probs[:, :2], rtol=0, atol=1e-5)
    d1 = together["D1"].probs
    assert (d1[-1, 0] - d1[-1, 1]).abs().max() > 1e-3


def test_mini_batches_settle_around_the_closed_form():
    """Uses the mean of 4 seeds over the last 500 of 3000 steps.

    For tau >= 0.5 the noise of a single run is at most 0.008, and 3 standard deviations of the mean are below 0.01.
    """
    taus = (0.5, 2.0)
    (curves,) = train([BANDITS[1]], "ipo", steps=FAST_STEPS, batch_size=9, seeds=4, taus=taus).values()
    means = curves.tail().mean((0, 1))
    expected = torch.stack([ipo_minimiser(BANDITS[1], tau) for tau in taus]).float()
    torch.testing.assert_close(means, expected, rtol=0, atol=0.01)


def test_the_table_compares_closed_forms_with_the_runs(runs):
    lines = table(runs).splitlines()
    assert "| D1 | IPO, closed form | 96.4 3.4 0.1 |" in lines[6]
    assert lines[7].split(" | ")[2:] == lines[6].split(" | ")[2:]
    assert len(lines) == 2 + 4 * len(BANDITS)


def test_a_full_run_writes_a_row_per_bandit_and_method_and_two_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.papers.ipo.STEPS", 100)
    run_ipo(9, tmp_path, fast=False)
    (file,) = (tmp_path / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["bandit"], row["method"]) for row in rows] == [(b.name, kind) for b in BANDITS for kind in KINDS]
    assert all(len(row["final_mean"]) == len(row["final_ci"]) == len(TAUS) for row in rows)
    assert rows[2]["closed_form"][0] == pytest.approx(by_hand("D1", 0.1), abs=1e-6)  # rounded to 6 digits
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["ipo_fig1.png", "ipo_fig2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


def test_empty_batches_and_missing_matplotlib_are_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        run_ipo(0, tmp_path, fast=False)
    monkeypatch.setattr("bench.papers.ipo.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"matplotlib: pip install -e '.\[train,bench\]'"):
        run_ipo(9, tmp_path, fast=False)
    assert not list(tmp_path.iterdir())
