"""Reward functions for the examples, named as examples/rewards.py:NAME."""

from typing import Any


def brevity(completions: list[str], **_: Any) -> list[float]:
    """One number per response: minus its length in characters, over 100."""
    return [-0.01 * len(completion) for completion in completions]
