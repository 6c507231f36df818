"""Computes win rates and paired score differences with bootstrap intervals, in numpy.

Scores belong to the same rows in the same order: entry i of `scores_a` and of `scores_b` are for the same prompt. Every
interval is a percentile bootstrap over rows (Efron 1979). It covers the choice of prompts but not the training seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
"""The bounds (low, high) of an interval."""

_DRAWS_AT_ONCE = 1 << 22
"""Maximum number of row indices in memory at a time (32 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Comparison of a model a with a model b on the same rows."""

    win_rate: float
    """Share of rows on which a beats b, in [0, 1]; a tie counts one half."""
    win_rate_ci: Interval
    mean_score: float
    """Mean score of a. The mean score of b is this number minus `mean_difference`."""
    mean_difference: float
    """Mean of (a - b), in the units of the scores."""
    mean_difference_ci: Interval
    num: int
    """Number of rows."""


def compare(
    scores_a: ArrayLike, scores_b: ArrayLike, *, level: float = 0.95, samples: int = 10000, seed: int = 0
) -> Comparison:
    """Computes the win rate of a against b and the mean score difference, each with its bootstrap interval at `level`.

    Raises ValueError as `win_rate` and `bootstrap_interval` do.
    """
    outcomes = _outcomes(scores_a, scores_b)
    difference, difference_ci = paired_difference(scores_a, scores_b, level=level, samples=samples, seed=seed)
    return Comparison(
        win_rate=float(outcomes.mean()),
        win_rate_ci=bootstrap_interval(outcomes, level=level, samples=samples, seed=seed),
        mean_score=float(np.asarray(scores_a, dtype=np.float64).mean()),
        mean_difference=difference,
        mean_difference_ci=difference_ci,
        num=len(outcomes),
    )


def win_rate(scores_a: ArrayLike, scores_b: ArrayLike) -> float:
    """Returns the win rate of a against b, the mean over rows of 1[a > b] + 1[a = b] / 2. win_rate(a, b) + win_rate(b,
    a) = 1.

    Args:
        scores_a, scores_b: [n] any real units, higher is better.

    Raises:
        ValueError: no rows, unequal lengths, more than one dimension, or a score that is NaN.
    """
    return float(_outcomes(scores_a, scores_b).mean())


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, samples: int = 10000, seed: int = 0
) -> tuple[float, Interval]:
    """Returns the mean over rows of (a - b) and its bootstrap interval at `level`.

    Pairing removes the variance that both scores share: an easy prompt raises both scores but not their difference.
    Raises ValueError as `win_rate` and `bootstrap_interval` do.
    """
    first, second = _paired(a, b)
    difference = first - second
    return float(difference.mean()), bootstrap_interval(difference, level=level, samples=samples, seed=seed)


def bootstrap_interval(values: ArrayLike, *, level: float = 0.95, samples: int = 10000, seed: int = 0) -> Interval:
    """Returns the percentile bootstrap interval of the mean of `values`.

    n rows are drawn with replacement and averaged, `samples` times; the bounds of the interval are the (1 - level) / 2
    and (1 + level) / 2 quantiles of these means. The same seed gives the same interval.

    Args:
        values: [n] one finite number per row.
        level: nominal coverage, a probability in (0, 1).

    Raises:
        ValueError: no rows, more than one dimension, a value that is not finite, `level` or `samples` out of range.
    """
    rows = _rows(values, "values")
    if not np.isfinite(rows).all():
        raise ValueError(f"values: row {int(np.argmin(np.isfinite(rows)))} is not finite, so the mean has no interval")
    if not 0 < level < 1:
        raise ValueError(f"level = {level} must lie between 0 and 1, for example 0.95")
    if samples < 1:
        raise ValueError(f"samples = {samples} must be at least 1, for example 10000")
    rng = np.random.default_rng(seed)
    num = len(rows)
    at_once = max(1, _DRAWS_AT_ONCE // num)
    means = np.concatenate(
        [
            rows[rng.integers(num, size=(min(at_once, samples - done), num))].mean(axis=1)
            for done in range(0, samples, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _outcomes(scores_a: ArrayLike, scores_b: ArrayLike) -> NDArray[np.float64]:
    a, b = _paired(scores_a, scores_b)
    return (a > b) + 0.5 * (a == b)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _rows(a, "a"), _rows(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} rows and b has {len(second)}; score the same rows with both")
    return first, second


def _rows(values: ArrayLike, name: str) -> NDArray[np.float64]:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"{name} must hold one number per row and at least one row; its shape is {rows.shape}")
    if np.isnan(rows).any():
        raise ValueError(f"{name}: row {int(np.argmax(np.isnan(rows)))} is NaN; remove the row from both sides")
    return rows
