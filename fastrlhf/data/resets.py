"""Where an episode starts (DR-PO, Chang et al. 2024, arXiv 2404.08495, Algorithm 2). Pure.

With probability `prob` the episode starts after the first k tokens of a dataset response, k uniform on
{minimum, ..., L - 1}; otherwise at the prompt. L counts the EOS, so the EOS itself is never given away and at least one
token is left to sample. Every draw is keyed by (seed, episode): it depends on neither the batch order, nor the number
of ranks, nor on any other draw of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrlhf.types import Prefix

RESET_STREAM = 1
"""Distinguishes these draws from the sampler's, which share seed and episode: one never moves the other."""


def uniforms(seed: int, stream: int, episode: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that depend on the three keys alone (Philox, counter-based)."""
    return np.random.Generator(np.random.Philox(key=[seed, (episode << 8) | stream])).random(count)


def reset_length(response_length: int, *, seed: int, episode: int, prob: float, minimum: int = 1) -> int:
    """Tokens of a response of `response_length` tokens (EOS included) to start after; 0 is no reset.

    A response with no admissible k (shorter than `minimum + 1` tokens) is never reset to, as in the authors' code.
    """
    choices = response_length - minimum
    if choices < 1:
        return 0
    coin, where = uniforms(seed, RESET_STREAM, episode, 2)
    return minimum + int(where * choices) if coin < prob else 0


def cut_prefix(
    prompt: Sequence[int], response: Sequence[int], *, row: int, seed: int, episode: int, prob: float, minimum: int = 1
) -> Prefix:
    """The prompt and the first k tokens of the response: where this episode starts."""
    k = reset_length(len(response), seed=seed, episode=episode, prob=prob, minimum=minimum)
    return Prefix(token_ids=[*prompt, *response[:k]], num_reset=k, row=row, episode=episode)
