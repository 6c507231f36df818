"""Responses that end at a string.

A response is cut after the token with which its text first holds one of the strings, and counts as ended. That token
may hold more than the string: tokens are trained as they were sampled. The wrapped engine does not know the strings;
tokens that it sampled after them are dropped, so their time is lost.
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
        """The rollout up to the first string of its completion; itself where there is none."""
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
    """An engine whose responses end at a string."""

    engine: Engine
    stops: Stops

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        return [self.stops.cut(rollout) for rollout in self.engine.generate(prefixes)]
