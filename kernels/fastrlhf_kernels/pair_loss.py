"""Losses on preference pairs: DPO, cDPO, robust DPO, IPO, hinge.

    u_s  = sum over the rows of sequence s in the mask of (logprob - reference_logprob)
    D    = u_chosen / n_chosen - u_rejected / n_rejected,   n by length_norm: 1, own tokens, or the pair's mean
    z    = beta D - margin
    loss = sum over pairs of weight L / num_pairs

    kind     L                                    dL/dD
    dpo      softplus(-z) + kappa z               beta (kappa - sigmoid(-z))
    robust   the same                             the same
    ipo      (D - target)^2                       2 (D - target)
    hinge    max(0, 1 - z)                        -beta where z < 1, else 0

kappa is 0, the label smoothing e (cDPO), 1 - label_prob (soft labels), or -e / (1 - 2 e) (robust: unbiased for labels
flipped with probability e; unbounded below, so stop early). target is 1 / (2 beta), beta being the paper's tau;
smoothing makes it (1 - 2 e) / (2 beta) and soft labels (label_prob - 1/2) / beta. Gradient with respect to a logprob:
dL/dD / n in the chosen sequence, -dL/dD / n in the rejected one, 0 outside the mask.

With length_norm "sum" (the papers) the IPO target is in nats per sequence, with "mean" (TRL's IPO) in nats per token:
at length n the mean with beta is the sum with beta / n, its loss n^2 smaller. "pair_mean" keeps D a scaled log-odds.

Differences are summed, never two large sums subtracted. The order of summation is that of the rows, on every run.

Legend: T rows, B pairs. DPO: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; IPO: Azar et al. 2023 (arXiv 2310.12036)
eq. 17; cDPO: Mitchell 2023; robust: Chowdhury et al. 2024 (arXiv 2403.00409); hinge: Zhao et al. 2023 (2305.10425).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf_kernels._checks import (
    check_choice,
    check_cu_seqlens,
    check_impl,
    check_range,
    check_rows,
    check_tensor,
    divisor,
)
from fastrlhf_kernels._segments import segment_of_row, segment_sum
from fastrlhf_kernels.types import LossOutput, Metric, Sum

KINDS = ("dpo", "ipo", "hinge", "robust")
LENGTH_NORMS = ("sum", "mean", "pair_mean")


def pair_loss(
    logprob: Tensor,  # [T] nats; gradient flows here and only here
    reference_logprob: Tensor | None,  # [T], or [2B] sums over the mask, or None for 0; [T] where T == 2B
    cu_seqlens: Tensor,  # [2B+1] int32 or int64: sequences 2i and 2i+1 are chosen and rejected of pair i
    mask: Tensor,  # [T] bool, True on the tokens of the responses
    *,
    num_pairs: float | Tensor,  # pairs of the whole optimiser step, over all micro-batches and ranks
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    label_prob: Tensor | None = None,  # [B] probability that chosen is the better one
    margin: Tensor | None = None,  # [B]
    weight: Tensor | None = None,  # [B]
    target: Tensor | None = None,  # [B] replaces IPO's 1 / (2 beta)
    length_norm: str = "sum",
    impl: str = "auto",
) -> LossOutput:
    """sum over pairs of weight L(z) / num_pairs, float32; a pair with an empty member counts for nothing.

    Metrics, sums over the pairs that count: loss (weighted), pairs, accuracy (pairs with a reward margin above 0),
    reward_chosen and reward_rejected (beta u, whatever the length_norm), margin (their difference), logprob_chosen and
    logprob_rejected (of whole sequences). Raises ValueError for bad arguments and for options the kind does not have.
    """
    check_impl(impl)
    check_rows("logprob", logprob)
    (num_rows,), device = logprob.shape, logprob.device
    check_cu_seqlens(cu_seqlens, num_rows, device)
    num_sequences = len(cu_seqlens) - 1
    if num_sequences % 2:
        raise ValueError(f"cu_seqlens must delimit chosen and rejected in turn, got {num_sequences} sequences")
    check_tensor("mask", mask, (num_rows,), device, (torch.bool,))
    check_range("beta", beta, 0, float("inf"), open_low=True)
    check_choice("length_norm", length_norm, LENGTH_NORMS)
    for name, tensor in (("label_prob", label_prob), ("margin", margin), ("weight", weight), ("target", target)):
        if tensor is not None:
            check_tensor(name, tensor, (num_sequences // 2,), device)
    _check_options(kind, label_smoothing, label_prob, margin, target)

    segment = segment_of_row(cu_seqlens, num_rows)
    logprob = logprob.float().where(mask, 0)
    shift: Tensor | float = 0.0
    if reference_logprob is not None and reference_logprob.shape == logprob.shape:
        check_tensor("reference_logprob", reference_logprob, (num_rows,), device)
        shift = reference_logprob.detach().float().where(mask, 0)
    log_ratio = segment_sum(logprob - shift, cu_seqlens, segment)
    if reference_logprob is not None and reference_logprob.shape != logprob.shape:
        check_tensor("reference_logprob", reference_logprob, (num_sequences,), device)
        log_ratio = log_ratio - reference_logprob.detach().float()

    counts = segment_sum(mask.float(), cu_seqlens, segment).view(-1, 2)
    valid = (counts > 0).all(1, keepdim=True)
    log_ratio = log_ratio.view(-1, 2).where(valid, 0)
    normed = log_ratio / _lengths(counts, length_norm)
    per_pair = _loss(normed[:, 0] - normed[:, 1], kind, beta, label_smoothing, label_prob, margin, target)
    if weight is not None:
        per_pair = per_pair * weight.detach().float()
    total = per_pair.where(valid[:, 0], 0).sum()

    reward_chosen, reward_rejected = (beta * log_ratio.detach()).unbind(1)
    sums = segment_sum(logprob.detach(), cu_seqlens, segment).view(-1, 2).where(valid, 0)
    metrics: dict[str, Metric] = {
        "loss": Sum(total.detach()),
        "pairs": Sum(valid.float().sum()),
        "accuracy": Sum((reward_chosen > reward_rejected).float().sum()),
        "reward_chosen": Sum(reward_chosen.sum()),
        "reward_rejected": Sum(reward_rejected.sum()),
        "margin": Sum((reward_chosen - reward_rejected).sum()),
        "logprob_chosen": Sum(sums[:, 0].sum()),
        "logprob_rejected": Sum(sums[:, 1].sum()),
    }
    return LossOutput(total / divisor("num_pairs", num_pairs), metrics)


def pair_loss_reference(
    logprob: Tensor,
    reference_logprob: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    *,
    num_pairs: float,
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_norm: str = "sum",
) -> Tensor:
    """The definition, one pair at a time in the textbooks' form, in the dtype given; [T] reference, no empty member."""
    total, bounds, eps = logprob.new_zeros(()), cu_seqlens.tolist(), label_smoothing
    for i in range(0, len(bounds) - 1, 2):
        members = [slice(bounds[j], bounds[j + 1]) for j in (i, i + 1)]
        counts = torch.stack([mask[rows].sum() for rows in members])
        length = {"sum": torch.ones(2), "mean": counts, "pair_mean": counts.float().mean().expand(2)}[length_norm]
        u = [(logprob[rows] - reference_logprob[rows])[mask[rows]].sum() for rows in members]
        difference = u[0] / length[0] - u[1] / length[1]
        win, lose = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
        total = (
            total
            + {
                "dpo": (1 - eps) * win + eps * lose,
                "robust": ((1 - eps) * win - eps * lose) / (1 - 2 * eps),
                "ipo": (difference - (1 - 2 * eps) / (2 * beta)) ** 2,
                "hinge": (1 - beta * difference).clamp(min=0),
            }[kind]
        )
    return total / num_pairs


def _loss(
    difference: Tensor,
    kind: str,
    beta: float,
    label_smoothing: float,
    label_prob: Tensor | None,
    margin: Tensor | None,
    target: Tensor | None,
) -> Tensor:
    """L [B] of D [B]."""
    flip = label_smoothing if label_prob is None else 1 - label_prob.detach().float()
    if kind == "ipo":
        return (difference - ((0.5 - flip) / beta if target is None else target.detach().float())).square()
    z = beta * difference - (0.0 if margin is None else margin.detach().float())
    if kind == "hinge":
        return F.relu(1 - z)
    kappa = -label_smoothing / (1 - 2 * label_smoothing) if kind == "robust" else flip
    return -F.logsigmoid(z) + kappa * z


def _lengths(counts: Tensor, length_norm: str) -> Tensor | float:
    """What the sums of the members are divided by: [B, 2], or one number for all."""
    if length_norm == "sum":
        return 1.0
    counts = counts.clamp(min=1)
    return counts if length_norm == "mean" else counts.mean(1, keepdim=True)


def _check_options(
    kind: str, label_smoothing: float, label_prob: Tensor | None, margin: Tensor | None, target: Tensor | None
) -> None:
    """Raises ValueError for an option that this kind would silently ignore."""
    check_choice("kind", kind, KINDS)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_prob is not None and label_smoothing:
        raise ValueError("label_prob and label_smoothing both say how sure the labels are: give one")
    if target is not None and (kind != "ipo" or label_prob is not None or label_smoothing):
        raise ValueError('target is for kind="ipo" alone, without label_prob and label_smoothing')
    if margin is not None and kind == "ipo":
        raise ValueError('margin is not for kind="ipo": pass target instead')
    if label_prob is not None and kind not in ("dpo", "ipo"):
        raise ValueError(f'label_prob is for kind="dpo" and "ipo", not {kind!r}')
    if label_smoothing and kind == "hinge":
        raise ValueError('label_smoothing is not for kind="hinge"')
