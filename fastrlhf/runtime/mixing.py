"""Joins the rows of several datasets, and determines how many rows of each an epoch draws.

With sizes n_i and weights w_i, a row of dataset i is drawn with frequency proportional to w_i, and dataset i has the
share p_i = w_i n_i / sum_j w_j n_j of all rows drawn. An epoch draws as many rows as the datasets have together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import count

import numpy as np

from fastrlhf.config import TrainConfig
from fastrlhf.config.sources import labels_of, weighted
from fastrlhf.data.examples import Origin
from fastrlhf.data.fingerprints import rows_fingerprint
from fastrlhf.data.token_report import MOST_SHOWN, TokenReport
from fastrlhf.data.token_set import TokenSet
from fastrlhf.runtime.token_store import Part
from fastrlhf.types import TokenizedExample

Shares = Sequence[tuple[int, float]]
"""(number of rows, weight) of each dataset; the rows of one dataset follow those of the one before. Empty if all
weights are equal, so that all rows are drawn equally often."""


def join_parts(parts: Sequence[Part | None], labels: Sequence[str], firsts: Sequence[int]) -> Part | None:
    """Joins the rows of several datasets into one part; None if no dataset has any. `labels`: the names of the
    datasets. `firsts`: the row number that the first row of each dataset gets."""
    given = [(part, label, first) for part, label, first in zip(parts, labels, firsts, strict=True) if part is not None]
    if not given:
        return None
    rows = TokenSet.joined(*(part.rows.of_dataset(label, first) for part, label, first in given))
    rows.known_fingerprint = "; ".join(rows_fingerprint(part.rows) for part, _, _ in given)
    return Part(
        rows=rows,
        report=join_reports([part.report for part, _, _ in given]),
        loaded="; ".join(part.loaded for part, _, _ in given),
        origin=Origin(
            sources=tuple(name for part, _, _ in given for name in part.origin.sources),
            lines=[line for part, _, _ in given for line in part.origin.lines],
            read=frozenset().union(*(part.origin.read for part, _, _ in given)),
        ),
        conversations=any(part.conversations for part, _, _ in given),
        earlier_turns=sum(part.earlier_turns for part, _, _ in given),
        num_read=sum(part.num_read for part, _, _ in given),
    )


def join_reports(reports: Sequence[TokenReport]) -> TokenReport:
    """Adds up the counts of several reports and keeps the first rows that they name."""
    joined = reports[0]
    for other in reports[1:]:
        values = {}
        for name in TokenReport.__dataclass_fields__:
            one, two = getattr(joined, name), getattr(other, name)
            if name == "dropped_rows":
                values[name] = {key: [*one.get(key, []), *two.get(key, [])][:MOST_SHOWN] for key in {**one, **two}}
            elif name in ("dropped", "changed"):
                values[name] = {key: one.get(key, 0) + two.get(key, 0) for key in {**one, **two}}
            elif name == "firsts":
                values[name] = {**two, **one}
            elif isinstance(one, int) and name != "max_length":
                values[name] = one + two
            else:  # equal in all reports
                values[name] = one
        joined = replace(joined, **values)
    return joined


def shares_of(config: TrainConfig, rows: Sequence[TokenizedExample]) -> Shares:
    """Returns the numbers of rows and the weights of the datasets of `rows`. Rows that belong to no entry of
    `dataset_name` have weight 1."""
    weights = weights_of(config)
    if {*weights.values()} <= {1.0}:
        return []
    names, numbers = TokenSet.of(rows).datasets()
    nums = np.bincount(numbers, minlength=len(names)).tolist()
    shares = [(num, weights.get(name, 1.0)) for name, num in zip(names, nums, strict=True)]
    return [] if len({weight for _, weight in shares}) <= 1 else shares


def weights_of(config: TrainConfig) -> Mapping[str, float]:
    """Returns the weight of each entry of `dataset_name` by its label; empty if it has no entries."""
    sources = weighted(config.dataset_name)
    return {label: source.weight for label, source in zip(labels_of(sources), sources, strict=True)}


def describe(config: TrainConfig, rows: TokenSet, *, drawn: bool) -> str:
    """Returns one line with the number of rows and the row numbers of each dataset, and, if rows are `drawn` with
    weights, the weight and the share of each dataset."""
    weights, (names, numbers) = weights_of(config), rows.datasets()
    nums = np.bincount(numbers, minlength=len(names))
    every = sum(weights.get(name, 1.0) * int(num) for name, num in zip(names, nums, strict=True))
    parts = []
    for name, num, first in zip(names, nums.tolist(), rows.first_rows(), strict=True):
        weight = weights.get(name, 1.0)
        share = f", weight {weight:g}, {weight * num / every:.1%} of all draws" if drawn else ""
        parts.append(f"{name} {num:,} (numbered from {first}{share})")
    return f"{len(rows):,} rows of {len(names)} datasets: {', '.join(parts)}"


def mixed_epochs(shares: Shares, seed: int) -> Iterator[np.ndarray]:
    """Yields the row indices of one epoch after the other, [N] int64, N the number of rows of all datasets.

    After any number of epochs, dataset i has been drawn `drawn_after` times. The datasets are shuffled within an epoch.
    The rows of a dataset are drawn without replacement; when all have been drawn, they are shuffled again.
    """
    sizes = [size for size, _ in shares]
    first, done = np.cumsum([0, *sizes]), [0] * len(sizes)
    for epoch in count():
        after = drawn_after(shares, epoch + 1)
        owners = np.repeat(np.arange(len(sizes)), [end - start for start, end in zip(done, after, strict=True)])
        owners = owners[np.random.default_rng([seed, epoch]).permutation(len(owners))]
        drawn = np.empty(len(owners), np.int64)
        for i, size in enumerate(sizes):
            if size:
                drawn[owners == i] = first[i] + _drawn(size, done[i], after[i], (seed, i))
        yield drawn
        done = after


def drawn_after(shares: Shares, epochs: int) -> list[int]:
    """Returns how often each dataset is drawn in the first `epochs` epochs: the apportionment of all draws by the
    method of Webster and Sainte-Lague, whose numbers never decrease as the draws grow."""
    masses = [size * Fraction(weight) for size, weight in shares]
    draws = epochs * sum(size for size, _ in shares)
    counts = [math.ceil(draws * mass / sum(masses) - Fraction(1, 2)) for mass in masses]
    while sum(counts) < draws:
        best = max(range(len(masses)), key=lambda i: (masses[i] / (2 * counts[i] + 1), -i))
        counts[best] += 1
    while sum(counts) > draws:
        worst = min((i for i in range(len(masses)) if counts[i]), key=lambda i: (masses[i] / (2 * counts[i] - 1), -i))
        counts[worst] -= 1
    return counts


def _drawn(size: int, start: int, end: int, seed: tuple[int, int]) -> np.ndarray:
    """Returns the draws number `start` to `end` from a dataset of `size` rows, which are one permutation after the
    other."""
    passes = range(start // size, -(-end // size))
    orders = [np.random.default_rng([*seed, number, 1]).permutation(size) for number in passes]
    every = np.concatenate(orders) if orders else np.zeros(0, np.int64)
    return every[start - size * passes.start : end - size * passes.start]
