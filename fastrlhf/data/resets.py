"""Where an episode starts (DR-PO, Chang et al. 2024, arXiv 2404.08495, Algorithm 2). Pure.

With probability `prob` the episode starts after the first k tokens of a response, k uniform on {minimum, ..., L - 1};
otherwise at the prompt. L counts the EOS, so the EOS itself is never copied and at least one token is left to sample.
Where only some cuts are allowed, such as ends of sentences, k is uniform on those within the same bounds.
Every draw is keyed by (seed, key), the key being the number of an episode, or of a group of episodes that start
at the same point: it depends on neither the batch order, nor the number of ranks, nor on any other draw of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fastrlhf.types import Prefix

RESET_STREAM = 1
"""Stream of these draws. The sampler uses the same seed and episode with another stream, so the two are independent."""


def uniforms(seed: int, stream: int, episode: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that depend on the three keys alone (Philox, counter-based)."""
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
    """Number of tokens to copy from a response of `response_length` tokens (EOS included); 0 is no reset.

    There is no reset into a response without an admissible k (shorter than `minimum + 1` tokens), as in the authors'
    code. `withheld`, in 0..1, is the share of the admissible k, the shortest first, that is left out; at 1 only the
    longest remains. `cuts`, ascending: the only k that are admissible; None: all within the bounds.
    """
    allowed = range(minimum, response_length)
    if cuts is not None:
        allowed = [k for k in cuts if minimum <= k < response_length]
    if not allowed or not is_reset(seed=seed, key=key, prob=prob):
        return 0
    left_out = min(int(withheld * len(allowed)), len(allowed) - 1)
    return allowed[left_out + int(uniforms(seed, RESET_STREAM, key, 2)[1] * (len(allowed) - left_out))]


def sentence_cuts(response: Sequence[int], sentence_ends: Collection[int]) -> list[int]:
    """Every k such that the first k tokens of the response end with a token that ends a sentence."""
    return [k for k, token in enumerate(response, 1) if token in sentence_ends]


def one_of(choices: Sequence[int], *, seed: int, key: int) -> int:
    """Draws one of several responses that a reset may copy from, with equal probability."""
    return choices[int(uniforms(seed, RESET_STREAM, key, 4)[3] * len(choices))]


def takes_first(*, seed: int, key: int) -> bool:
    """A fair coin that picks which of two responses the reset copies from."""
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
    """The prompt and the first k tokens of the response: where this episode starts."""
    depth = k / len(response) if k else 0.0
    return Prefix(
        token_ids=[*prompt, *response[:k]],
        num_reset=k,
        reset_depth=depth,
        row=row,
        episode=episode,
        temperature=temperature,
    )
