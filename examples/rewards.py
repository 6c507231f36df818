"""Reward functions for the examples, named as examples/rewards.py:NAME."""

import re
from typing import Any


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Returns 1 for each response whose last number is the `answer` of its row (a column of the dataset), otherwise
    0."""
    numbers = [re.findall(r"-?\d+", completion) for completion in completions]
    return [float(bool(found) and found[-1] == wanted) for found, wanted in zip(numbers, answer, strict=True)]


def brevity(completions: list[str], **_: Any) -> list[float]:
    """Returns minus the number of characters of each response, divided by 100."""
    return [-0.01 * len(completion) for completion in completions]
