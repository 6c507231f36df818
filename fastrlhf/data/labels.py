"""Reads and checks the labels of a row: numbers that say which response is better."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

from fastrlhf.data.rows import UnusableRow

GROUP_LABELS = ("preferences", "scores")
COUNTS = ("wins", "num_labels")
PAIR_LABELS = ("label", "label_prob", "margin", *COUNTS)
TOLERANCE = 1e-3
"""Allowed deviation of P_ij + P_ji from 1, because probabilities in files are often rounded."""


def read_group_labels(row: Mapping[str, Any], num_responses: int) -> dict[str, Any]:
    """Returns the `preferences` [K][K] or the `scores` [K] of K responses as floats; empty if the row has neither.

    Raises UnusableRow for values that are not numbers, and for preferences that are not probabilities with P_ij + P_ji
    = 1 (so P_ii is 1/2). If a judge depends on the order of the two responses, average its preferences over both orders
    first.
    """
    given = [name for name in GROUP_LABELS if row.get(name) is not None]
    if len(given) == 2:
        raise UnusableRow("preferences_and_scores", "the row has both preferences and scores; remove one of them")
    if given == ["scores"]:
        return {"scores": _numbers(row["scores"], num_responses, "scores")}
    if given == ["preferences"]:
        matrix = row["preferences"]
        if not isinstance(matrix, list) or len(matrix) != num_responses:
            raise UnusableRow("wrong_type", f"preferences must be a list of {num_responses} rows, one per response")
        matrix = [_numbers(line, num_responses, f"preferences[{i}]") for i, line in enumerate(matrix)]
        for i in range(num_responses):
            for j in range(i + 1):
                p, q = matrix[i][j], matrix[j][i]
                if not (0 <= p <= 1 and 0 <= q <= 1) or abs(p + q - 1) > TOLERANCE:
                    raise UnusableRow(
                        "no_probabilities",
                        f"preferences[{i}][{j}] = {p:g} and preferences[{j}][{i}] = {q:g} must be in 0..1 and add up "
                        "to 1",
                    )
        return {"preferences": matrix}
    return {}


def read_pair_labels(row: Mapping[str, Any], needs: Collection[str]) -> dict[str, Any]:
    """Returns the labels in PAIR_LABELS that are needed. Raises UnusableRow if a needed label is missing or invalid:
    `label` must be true or false, `label_prob` in 0..1, `margin` finite, and `wins` at most `num_labels`."""
    numbers: dict[str, Any] = {name: _number(row.get(name), name) for name in ("label_prob", "margin") if name in needs}
    if "label" in needs:
        numbers["label"] = read_label(row.get("label"))
    return numbers | (read_counts(row) if set(COUNTS) & set(needs) else {})


def read_label(value: object) -> bool:
    """Converts a label to a bool, True for a desirable response. CSV files give text, and some datasets give 0 and 1.
    Raises UnusableRow for other values."""
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if value is None:
        raise UnusableRow("missing_label", "no label in this row")
    if not isinstance(value, bool | Integral) or value not in (0, 1):
        raise UnusableRow("bad_label", f"label is {value!r}, not true or false")
    return bool(value)


def read_counts(row: Mapping[str, Any]) -> dict[str, int]:
    """Returns `wins`, the number of comparisons that chosen won, and `num_labels`, the number of comparisons. Raises
    UnusableRow if either is missing or not a count."""
    counts: dict[str, int] = {}
    for name in COUNTS:
        value = row.get(name)
        if value is None:
            raise UnusableRow(f"missing_{name}", f"this row has no {name}")
        text = isinstance(value, str) and value.isdecimal()  # cells of CSV files are text
        if not text and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise UnusableRow("wrong_type", f"{name} is {value!r}, not a count")
        counts[name] = int(value)
    if not 0 <= counts["wins"] <= counts["num_labels"]:
        raise UnusableRow("wrong_counts", f"{counts['wins']} wins of {counts['num_labels']} labels")
    return counts


def _number(value: object, name: str) -> float:
    number = _float(value) if isinstance(value, str) or _is_number(value) else math.nan
    if not math.isfinite(number) or (name == "label_prob" and not 0 <= number <= 1):
        raise UnusableRow(f"bad_{name}", f"{name} is {value!r}, not {'in 0..1' if name == 'label_prob' else 'finite'}")
    return number


def _float(value: str | Real) -> float:
    """Converts a value to a float; text that is not a number and an integer too large for a float become NaN."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _is_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _numbers(value: object, size: int, name: str) -> list[float]:
    if not isinstance(value, list) or len(value) != size or not all(map(_is_number, value)):
        raise UnusableRow("wrong_type", f"{name} must be a list of {size} numbers, one per response")
    numbers = [_float(number) for number in value]
    if not all(map(math.isfinite, numbers)):
        raise UnusableRow("not_finite", f"{name} holds a number that is not finite")
    return numbers
