"""Ends responses at stop strings.

A response is cut after the first token with which its text contains one of the strings, and counts as ended. That token
may contain more text than the string, because tokens are never split. The wrapped engine does not know the strings, so
it also samples tokens after them, which are dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from fastrlhf.rollout.engine import Engine
from fastrlhf.types import Prefix, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """Finds the stop strings of a run in responses."""

    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def cut(self, rollout: Rollout) -> Rollout:
        """Cuts a rollout after the first stop string in its completion; without one it is returned unchanged."""
        tokens = rollout.completion
        if not self._holds_one(tokens):
            return rollout
        end = bisect_left(range(1, len(tokens) + 1), True, key=lambda num: self._holds_one(tokens[:num])) + 1
        return replace(
            rollout,
            completion=tokens[:end],
            sampler_logprob=rollout.sampler_logprob[:end],
            ended=True,
            kept=None if rollout.kept is None else rollout.kept[:end],
        )

    def _holds_one(self, tokens: list[int]) -> bool:
        text = str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        return any(string in text for string in self.strings)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingEngine:
    """Wraps an engine so that its responses end at stop strings."""

    engine: Engine
    stops: Stops

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        return [self.stops.cut(rollout) for rollout in self.engine.generate(prefixes)]
