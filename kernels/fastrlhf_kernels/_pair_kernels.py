"""Computes the loss of one pair and its derivatives for every kind of `pair_loss`, in torch and in Triton.

Also checks the options of `pair_loss`.

The formulas are in the docstring of pair_loss.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf_kernels._checks import check_choice
from fastrlhf_kernels._triton import constant, jit, tl

KINDS = ("dpo", "ipo", "hinge", "robust", "apo_zero", "apo_down", "orpo")
BOUND = -(2.0**-20)
MAX_MEAN_LOGPROB = constant(BOUND)
"""ORPO clamps mean log-probs (nats per token) to this value, because a response of probability 1 has infinite odds."""


def torch_pair_terms(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    kappa: float,
    label_prob: Tensor | None,
    margin: Tensor | None,
    target: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (L, dL/dv_chosen, dL/dv_rejected), [B] each, for length-normalised log-ratios; see `pair_loss`."""
    difference = chosen - rejected
    if kind == "apo_zero":
        loss_chosen, slope_chosen = _torch_sigmoid(-beta * chosen)
        loss_rejected, slope_rejected = _torch_sigmoid(beta * rejected)
        return loss_chosen + loss_rejected, -beta * slope_chosen, beta * slope_rejected
    if kind == "apo_down":
        loss_chosen, slope_chosen = _torch_sigmoid(beta * chosen)
        loss_margin, slope_margin = _torch_sigmoid(-beta * difference)
        return loss_chosen + loss_margin, beta * (slope_chosen - slope_margin), beta * slope_margin
    if kind == "orpo":
        odds_chosen, d_chosen = _torch_log_odds(chosen)
        odds_rejected, d_rejected = _torch_log_odds(rejected)
        z = odds_chosen - odds_rejected
        slope = beta * torch.sigmoid(-z)
        return -beta * F.logsigmoid(z), -slope * d_chosen, slope * d_rejected
    flip = kappa if label_prob is None else 1 - label_prob
    if kind == "ipo":
        error = difference - ((0.5 - flip) / beta if target is None else target)
        return error.square(), 2 * error, -2 * error
    z = beta * difference
    if margin is not None:
        z = z - margin
    if kind == "hinge":
        slope = torch.full_like(z, -beta).masked_fill(z >= 1, 0)
        return F.relu(1 - z), slope, -slope
    slope = beta * (flip - torch.sigmoid(-z))
    return flip * z - F.logsigmoid(z), slope, -slope


def _torch_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sigmoid and its derivative, which stays exact even if the sigmoid rounds to 1."""
    return torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)


def _torch_log_odds(mean_logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-odds log(p / (1 - p)) for a mean log-prob log p, and their derivative with respect to log p."""
    clamped = mean_logprob.clamp(max=BOUND)
    other = -torch.expm1(clamped)
    return clamped - other.log(), 1 / other


@jit
def pair_terms(chosen, rejected, beta, kappa, label_prob, margin, target, KIND: tl.constexpr):
    """Returns (L, dL/dv_chosen, dL/dv_rejected) in float32; label_prob, margin and target may be None."""
    difference = chosen - rejected
    flip = kappa
    if label_prob is not None:
        flip = 1 - label_prob
    if KIND == "apo_zero":
        loss_chosen, slope_chosen = sigmoid(-beta * chosen)
        loss_rejected, slope_rejected = sigmoid(beta * rejected)
        loss = loss_chosen + loss_rejected
        d_chosen = -beta * slope_chosen
        d_rejected = beta * slope_rejected
    elif KIND == "apo_down":
        loss_chosen, slope_chosen = sigmoid(beta * chosen)
        loss_margin, slope_margin = sigmoid(-beta * difference)
        loss = loss_chosen + loss_margin
        d_chosen = beta * (slope_chosen - slope_margin)
        d_rejected = beta * slope_margin
    elif KIND == "orpo":
        odds_chosen, odds_slope_chosen = log_odds(chosen)
        odds_rejected, odds_slope_rejected = log_odds(rejected)
        z = odds_chosen - odds_rejected
        small = tl.exp(-tl.abs(z))
        slope = beta * tl.where(z < 0, 1.0, small) / (1 + small)
        loss = beta * (log1p(small) + tl.where(z < 0, -z, 0.0))
        d_chosen = -slope * odds_slope_chosen
        d_rejected = slope * odds_slope_rejected
    elif KIND == "ipo":
        aim = target
        if target is None:
            aim = (0.5 - flip) / beta
        loss = (difference - aim) * (difference - aim)
        d_chosen = 2 * (difference - aim)
        d_rejected = -d_chosen
    else:
        z = beta * difference
        if margin is not None:
            z -= margin
        if KIND == "hinge":
            loss = tl.where(z >= 1, 0.0, 1 - z)
            d_chosen = tl.where(z >= 1, 0.0, -beta)
        else:
            small = tl.exp(-tl.abs(z))
            loss = flip * z + log1p(small) + tl.where(z < 0, -z, 0.0)
            d_chosen = beta * (flip - tl.where(z < 0, 1.0, small) / (1 + small))
        d_rejected = -d_chosen
    return loss, d_chosen, d_rejected


@jit
def sigmoid(x):
    """Returns the sigmoid and its derivative, both with a small relative error."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small), small / ((1 + small) * (1 + small))


@jit
def log_odds(mean_logprob):
    """Returns the log-odds log(p / (1 - p)) for a mean log-prob log p, and their derivative with respect to log p."""
    clamped = tl.where(mean_logprob > MAX_MEAN_LOGPROB, MAX_MEAN_LOGPROB, mean_logprob)
    series = clamped * 0 + 1  # 1 - p by its Taylor series, used for p near 1
    for n in tl.static_range(10, 1, -1):  # pyright: ignore[reportGeneralTypeIssues]
        series = 1 + series * clamped / n
    other = tl.where(clamped > -0.5, -clamped * series, 1 - tl.exp(clamped))
    return clamped - tl.log(other), 1 / other


@jit
def log1p(x):
    """Returns log(1 + x) for x in [0, 1], with a small relative error even for tiny x: 2 artanh(x / (2 + x)) by its
    series up to power 15."""
    s = x / (2 + x)
    square = s * s
    series = square * 0
    for n in tl.static_range(15, 0, -2):  # pyright: ignore[reportGeneralTypeIssues]
        series = series * square + 1.0 / n
    return 2 * s * series


def check_options(
    kind: str,
    label_smoothing: float,
    label_prob: Tensor | None,
    margin: Tensor | None,
    target: Tensor | None,
    reference_logprob: Tensor | None,
    length_norm: str,
) -> None:
    """Raises ValueError for an option that this kind of loss would ignore or does not support."""
    check_choice("kind", kind, KINDS)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_prob is not None and label_smoothing:
        raise ValueError("label_prob and label_smoothing both describe the noise of labels: give only one")
    if target is not None and (kind != "ipo" or label_prob is not None or label_smoothing):
        raise ValueError('target is only for kind="ipo", without label_prob and label_smoothing')
    if margin is not None and kind == "ipo":
        raise ValueError('margin is not for kind="ipo": pass target instead')
    if margin is not None and kind not in ("dpo", "robust", "hinge"):
        raise ValueError(f"margin is not for kind={kind!r}")
    if label_prob is not None and kind not in ("dpo", "ipo"):
        raise ValueError(f'label_prob is for kind="dpo" and "ipo", not {kind!r}')
    if label_smoothing and kind not in ("dpo", "ipo", "robust"):
        raise ValueError(f"label_smoothing is not for kind={kind!r}")
    if kind == "orpo" and (reference_logprob is not None or length_norm != "mean"):
        raise ValueError('kind="orpo" is a loss of mean log-probs: reference_logprob must be None, length_norm "mean"')
