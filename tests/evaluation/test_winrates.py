import dataclasses

import numpy as np
import pytest

from fastrlhf.evaluation import winrates
from fastrlhf.evaluation.winrates import bootstrap_interval, compare, paired_difference, win_rate


def test_a_tie_counts_half():
    assert win_rate([1, 2, 3, 4], [0, 2, 5, 3]) == (1 + 0.5 + 0 + 1) / 4


def test_win_rates_of_both_sides_sum_to_one():
    rng = np.random.default_rng(1)
    a, b = rng.integers(4, size=101), rng.integers(4, size=101)
    assert win_rate(a, b) + win_rate(b, a) == pytest.approx(1, abs=1e-15)


def test_infinite_scores_are_compared_like_others():
    assert win_rate([np.inf, -np.inf], [0.0, 0.0]) == 0.5


def test_the_interval_of_a_fair_coin_is_the_binomial_one():
    """For the rows 0 and 1 the bootstrap mean is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4. The middle 40 % of the
    distribution therefore contain only 1/2."""
    assert bootstrap_interval([0, 1], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0, 1], level=0.6) == (0.0, 1.0)


def test_the_interval_agrees_with_the_normal_approximation_on_many_rows():
    values = np.random.default_rng(2).normal(3.0, 2.0, size=2000)
    low, high = bootstrap_interval(values)
    half = 1.959964 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03 * half)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.exponential(size=200), level=0.9, samples=500, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.85 <= hits / 300 <= 0.94


def test_the_interval_depends_on_the_seed_and_not_on_the_chunking(monkeypatch):
    values = np.random.default_rng(4).normal(size=50)
    first = bootstrap_interval(values, samples=999, seed=5)
    assert bootstrap_interval(values, samples=999, seed=5) == first
    assert bootstrap_interval(values, samples=999, seed=6) != first
    monkeypatch.setattr(winrates, "_DRAWS_AT_ONCE", 70)
    assert bootstrap_interval(values, samples=999, seed=5) == first


def test_one_row_has_an_interval_of_width_0():
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


def test_pairing_removes_the_variance_that_both_sides_share():
    difficulty = np.random.default_rng(6).normal(0, 100, size=64)
    mean, (low, high) = paired_difference(difficulty + 0.25, difficulty)
    assert (mean, low, high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)


def test_a_comparison_holds_the_same_numbers_as_its_parts():
    a, b = np.random.default_rng(7).normal([[0.3], [0.0]], 1.0, size=(2, 80))
    result = compare(a, b, samples=500, seed=8)
    assert result.num == 80
    assert result.win_rate == win_rate(a, b)
    assert result.win_rate_ci == bootstrap_interval(np.where(a > b, 1.0, 0.0), samples=500, seed=8)
    assert (result.mean_difference, result.mean_difference_ci) == paired_difference(a, b, samples=500, seed=8)
    assert result.win_rate_ci[0] < result.win_rate < result.win_rate_ci[1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.num = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "at least one row"),
        ([1.0], [1.0, 2.0], "1 rows and b has 2"),
        ([[1.0]], [[2.0]], r"shape is \(1, 1\)"),
        ([0.0, float("nan")], [0.0, 1.0], "row 1 is NaN"),
    ],
)
def test_scores_that_cannot_be_compared_are_an_error(a, b, message):
    with pytest.raises(ValueError, match=message):
        win_rate(a, b)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0, float("inf")], {}, "row 1 is not finite"),
        ([1.0], {"level": 95}, "level = 95"),
        ([1.0], {"samples": 0}, "samples = 0"),
    ],
)
def test_invalid_arguments_of_an_interval_are_errors(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)
