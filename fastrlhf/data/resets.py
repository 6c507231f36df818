"""Draws where an episode starts (DR-PO, Chang et al. 2024, arXiv 2404.08495, Algorithm 2), by pure functions.

With probability `prob` the episode starts after the first k tokens of a response, k uniform on {minimum, ..., L - 1};
otherwise it starts right after the prompt. The length L includes the EOS, so the EOS itself is never copied and at
least one token is left to sample. If only some values of k are allowed, such as ends of sentences, k is uniform on the
allowed values within these bounds. Every draw depends only on (seed, key), where the key is the number of an episode,
or of a group of episodes that start at the same point. It does not depend on the batch order, the number of ranks, or
other draws of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fastrlhf.types import Prefix

RESET_STREAM = 1
"""Random stream for drawing resets. The sampler uses the same seed and episode with another stream, so that its draws
are independent of the resets."""


def uniforms(seed: int, stream: int, episode: int, count: int) -> np.ndarray:
    """Draws `count` float64 numbers in [0, 1) that depend only on `seed`, `stream` and `episode` (Philox, a
    counter-based generator)."""
    return np.random.Generator(np.random.Philox(key=[seed, (episode << 8) | stream])).random(count)


def is_reset(*, seed: int, key: int, prob: float) -> bool:
    """Draws whether the episode starts inside a response."""
    return uniforms(seed, RESET_STREAM, key, 1)[0] < prob


def reset_length(
    response_length: int,
    *,
    seed: int,
    key: int,
    prob: float,
    minimum: int = 1,
    withheld: float = 0.0,
    cuts: Sequence[int] | None = None,
) -> int:
    """Draws the number of tokens to copy from a response of `response_length` tokens (including the EOS); 0 means no
    reset.

    A response without an allowed number, for example one shorter than `minimum + 1` tokens, gets no reset, as in the
    authors' code. `withheld`, in 0..1, is the share of the allowed numbers that is excluded, beginning with the
    smallest; at 1 only the largest remains. `cuts`, in ascending order, restricts the allowed numbers; None: no
    restriction.
    """
    allowed = range(minimum, response_length)
    if cuts is not None:
        allowed = [k for k in cuts if minimum <= k < response_length]
    if not allowed or not is_reset(seed=seed, key=key, prob=prob):
        return 0
    left_out = min(int(withheld * len(allowed)), len(allowed) - 1)
    return allowed[left_out + int(uniforms(seed, RESET_STREAM, key, 2)[1] * (len(allowed) - left_out))]


def sentence_cuts(response: Sequence[int], sentence_ends: Collection[int]) -> list[int]:
    """Returns every k for which the first k tokens of the response end with a token that ends a sentence."""
    return [k for k, token in enumerate(response, 1) if token in sentence_ends]


def one_of(choices: Sequence[int], *, seed: int, key: int) -> int:
    """Draws one of several responses that a reset may copy from, with equal probability."""
    return choices[int(uniforms(seed, RESET_STREAM, key, 4)[3] * len(choices))]


def takes_first(*, seed: int, key: int) -> bool:
    """Draws, with equal probability, whether a reset copies from the first of two responses or from the second."""
    return uniforms(seed, RESET_STREAM, key, 3)[2] < 0.5


def cut_prefix(
    prompt: Sequence[int],
    response: Sequence[int],
    k: int,
    *,
    row: int,
    episode: int,
    temperature: float | None = None,
) -> Prefix:
    """Returns the prefix from which an episode starts: the prompt and the first k tokens of the response."""
    depth = k / len(response) if k else 0.0
    return Prefix(
        token_ids=[*prompt, *response[:k]],
        num_reset=k,
        reset_depth=depth,
        row=row,
        episode=episode,
        temperature=temperature,
    )
