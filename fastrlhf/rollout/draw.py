"""Draws tokens from logits; the engine calls it once per decoding step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256
"""Columns whose probabilities are summed together. A cumulative sum is sequential, so it runs over the sums of blocks
and over the columns of the drawn block, but not over the whole vocabulary."""


def draw_tokens(
    logits: Tensor, temperature: float | Tensor, uniform: Tensor, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws a token per row of logits [N, V] float32 by inverting the cumulative distribution. Returns the tokens [N]
    int64 and their log-probs [N] float32 in nats. If logits are NaN, so is the log-prob.

    `temperature`: a number, where 0 takes the token of the largest logit at temperature 1, or [N, 1] above 0.
    `uniform` [N] in [0, 1) selects the tokens. `ids` [V]: the tokens of the columns.
    """
    (rows, columns), greedy = logits.shape, isinstance(temperature, float) and temperature == 0
    temperature = 1.0 if greedy else temperature
    # The probabilities, not normalised, are computed in place: fresh memory costs more than the arithmetic.
    weights = logits.new_empty(rows, math.ceil(columns / BLOCK) * BLOCK)
    weights[:, columns:].fill_(-math.inf)
    torch.div(logits, temperature, out=weights[:, :columns])
    largest = weights.amax(-1, keepdim=True)
    blocks = weights.sub_(largest).exp_().view(rows, -1, BLOCK)
    cumulative = blocks.sum(-1).cumsum(-1)
    if greedy:
        token = logits.argmax(-1, keepdim=True)
    else:
        block, rest = _find(cumulative, uniform[:, None] * cumulative[:, -1:])
        inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
        token = (block * BLOCK + _find(inside, rest)[0]).clamp(max=columns - 1)
    logprob = logits.gather(1, token) / temperature - largest - cumulative[:, -1:].log()
    return (token if ids is None else ids[token])[:, 0], logprob[:, 0]


def _find(cumulative: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first column [N, 1] of `cumulative` [N, K] that is above the threshold [N, 1], and by how much the
    threshold is above the column before. The column has a weight above 0 unless weights are NaN."""
    total = cumulative[:, -1:]
    # A threshold that rounding makes equal to the total would select a column without weight, so it stays below.
    threshold = torch.minimum(threshold, total.nextafter(torch.zeros_like(total)))
    # If weights are NaN, the search ends past the last column.
    column = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(column > 0, cumulative.gather(1, (column - 1).clamp(min=0)), 0.0)
    return column, threshold - before
