"""Losses on preference pairs: DPO, cDPO, robust DPO, IPO, hinge, APO and ORPO.

    u_s  = sum of (logprob - reference_logprob) over the rows of sequence s in the mask
    v_s  = u_s / n_s (n: see length_norm below),   D = v_chosen - v_rejected
    z    = beta D - margin
    loss = sum over pairs of weight L / num_pairs

    kind      L                                                           dL/dv_chosen                dL/dv_rejected
    dpo       softplus(-z) + kappa z                                      beta (kappa - sigmoid(-z))  -dL/dv_chosen
    robust    softplus(-z) + kappa z                                      beta (kappa - sigmoid(-z))  -dL/dv_chosen
    ipo       (D - target)^2                                              2 (D - target)              -dL/dv_chosen
    hinge     max(0, 1 - z)                                               -beta if z < 1, else 0      -dL/dv_chosen
    apo_zero  sigmoid(-beta v_chosen) + sigmoid(beta v_rejected)          from the derivative of the sigmoid
    apo_down  sigmoid(beta v_chosen) + sigmoid(-beta D)                   from the derivative of the sigmoid
    orpo      beta softplus(odds(v_rejected) - odds(v_chosen)),  odds(v) = v - log(1 - exp(v)) of a mean log-prob v

kappa is 0 for hard labels, e with label smoothing e (cDPO) and 1 - label_prob with soft labels. For robust it is
-e / (1 - 2 e): this loss is unbiased for labels flipped with probability e, but unbounded below, so stop early. The
target of IPO is 1 / (2 beta), where beta is the paper's tau; (1 - 2 e) / (2 beta) with label smoothing; and
(label_prob - 1/2) / beta with soft labels. The gradient with respect to a logprob is dL/dv / n of its sequence, and 0
outside the mask.

Without a reference (None) the log-probs of the policy take the place of log-ratios. kind "dpo" is then CPO (Xu et al.
2024, arXiv 2401.08417, eq. 3) with length_norm "sum", and SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6) with "mean"
and gamma as the margin. The caller adds the other terms of these papers.

length_norm sets n: 1 ("sum", as in the papers), the sequence's own number of tokens ("mean", TRL's IPO) or the mean
number of the pair ("pair_mean"). With "sum" the IPO target is in nats per sequence, with "mean" in nats per token: at
length n, "mean" with beta equals "sum" with beta / n, and its loss is n^2 smaller. "pair_mean" keeps D proportional to
a difference of log-odds.

The op sums differences of log-probs; it never subtracts two large sums. The order of summation depends only on the
sequence.

On a GPU each program of one kernel reads the rows of a pair and then writes their gradients: 14 T bytes in float32, or
10 T without a reference per row. The backward moves 8 T.

Legend: T rows, B pairs. DPO: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; IPO: Azar et al. 2023 (arXiv 2310.12036)
eq. 17; cDPO: Mitchell 2023; robust: Chowdhury et al. 2024 (arXiv 2403.00409); hinge: Zhao et al. 2023 (2305.10425);
APO: D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 7 and 8; ORPO: Hong et al. 2024 (arXiv 2403.07691) eq. 4 and 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf_kernels import _rows
from fastrlhf_kernels._checks import check_choice, check_cu_seqlens, check_range, check_rows, check_tensor, divisor
from fastrlhf_kernels._pair_kernels import check_options, pair_terms, torch_pair_terms
from fastrlhf_kernels._rows import contiguous, differentiate_by_slopes, load_float32, masked
from fastrlhf_kernels._segments import segment_bounds, segment_of_row, segment_sum
from fastrlhf_kernels._triton import OPTIONS, jit, tl, use_triton
from fastrlhf_kernels.types import LossOutput, Sum

WARPS = 8  # with 4, Triton 3.6 spills on sm_90
LENGTH_NORMS = ("sum", "mean", "pair_mean")
SUMS = ("pairs", "accuracy", "reward_chosen", "reward_rejected", "margin", "logprob_chosen", "logprob_rejected")


def pair_loss(
    logprob: Tensor,  # [T] nats; the only argument with a gradient
    reference_logprob: Tensor | None,  # [T], or [2B] sums over the rows in the mask, or None for 0; [T] if T == 2B
    cu_seqlens: Tensor,  # [2B+1] int32 or int64: of pair i, sequence 2i is chosen and 2i+1 rejected
    mask: Tensor,  # [T] bool, True on the tokens of the responses
    *,
    num_pairs: float | Tensor,  # pairs of the whole optimiser step, over all micro-batches and ranks
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    label_prob: Tensor | None = None,  # [B] probability that the chosen response is the better one
    margin: Tensor | None = None,  # [B]
    weight: Tensor | None = None,  # [B]
    target: Tensor | None = None,  # [B] replaces IPO's 1 / (2 beta)
    length_norm: str = "sum",
    impl: str = "auto",
) -> LossOutput:
    """Returns the preference loss sum(weight L) / num_pairs over all pairs, float32. A pair with an empty response is
    ignored.

    Raises ValueError for bad arguments and for options that the kind does not have. Metrics, summed over the pairs that
    are not ignored:

        loss                               weighted loss
        pairs                              1
        reward_chosen, reward_rejected     beta u, for every length_norm
        margin                             reward_chosen - reward_rejected
        accuracy                           1 if reward_chosen is above reward_rejected
        logprob_chosen, logprob_rejected   log-prob of the whole sequence
    """
    check_rows("logprob", logprob)
    (num_rows,), device = logprob.shape, logprob.device
    check_cu_seqlens(cu_seqlens, num_rows, device)
    num_sequences = len(cu_seqlens) - 1
    if num_sequences % 2:
        raise ValueError(f"cu_seqlens must delimit chosen and rejected in turn, got {num_sequences} sequences")
    check_tensor("mask", mask, (num_rows,), device, (torch.bool,))
    check_range("beta", beta, 0, float("inf"), open_ends=True)
    check_choice("length_norm", length_norm, LENGTH_NORMS)
    for name, tensor in (("label_prob", label_prob), ("margin", margin), ("weight", weight), ("target", target)):
        if tensor is not None:
            check_tensor(name, tensor, (num_sequences // 2,), device)
    check_options(kind, label_smoothing, label_prob, margin, target, reference_logprob, length_norm)

    per_row = reference_logprob is not None and reference_logprob.shape == logprob.shape
    if reference_logprob is not None:
        shape = (num_rows,) if per_row else (num_sequences,)
        check_tensor("reference_logprob", reference_logprob, shape, device)
        reference_logprob = reference_logprob.detach()
    options = (None if x is None else x.detach() for x in (label_prob, margin, weight, target))
    count = divisor("num_pairs", num_pairs)
    kappa = -label_smoothing / (1 - 2 * label_smoothing) if kind == "robust" else label_smoothing

    total, sums, _ = _pair_loss(
        logprob,
        reference_logprob,
        cu_seqlens,
        mask,
        *options,
        kind,
        float(beta),
        float(kappa),
        length_norm,
        per_row,
        use_triton(impl, device),
    )
    metrics = {"loss": Sum(total.detach())} | {name: Sum(x) for name, x in zip(SUMS, sums.unbind(), strict=True)}
    return LossOutput(total / count, metrics)


def pair_loss_reference(
    logprob: Tensor,
    reference_logprob: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor,
    *,
    num_pairs: float,
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_norm: str = "sum",
) -> Tensor:
    """Computes the loss by its definition, one pair at a time, in the dtype of the inputs.

    `reference_logprob` must be [T] or None, and every response must have rows in the mask.
    """
    total, bounds, eps = logprob.new_zeros(()), cu_seqlens.tolist(), label_smoothing
    for i in range(0, len(bounds) - 1, 2):
        members = [slice(bounds[j], bounds[j + 1]) for j in (i, i + 1)]
        counts = torch.stack([mask[rows].sum() for rows in members])
        length = {"sum": torch.ones(2), "mean": counts, "pair_mean": counts.float().mean().expand(2)}[length_norm]
        log_ratio = logprob if reference_logprob is None else logprob - reference_logprob
        chosen, rejected = (log_ratio[rows][mask[rows]].sum() / n for rows, n in zip(members, length, strict=True))
        difference = chosen - rejected
        win, lose = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
        total = (
            total
            + {
                "dpo": (1 - eps) * win + eps * lose,
                "robust": ((1 - eps) * win - eps * lose) / (1 - 2 * eps),
                "ipo": (difference - (1 - 2 * eps) / (2 * beta)) ** 2,
                "hinge": (1 - beta * difference).clamp(min=0),
                "apo_zero": 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected),
                "apo_down": torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * difference),
                "orpo": -beta * F.logsigmoid(torch.logit(chosen.exp()) - torch.logit(rejected.exp())),
            }[kind]
        )
    return total / num_pairs


@torch.library.custom_op("fastrlhf::pair_loss", mutates_args=())
def _pair_loss(
    logprob: Tensor,
    reference_logprob: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor,
    label_prob: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    target: Tensor | None,
    kind: str,
    beta: float,
    kappa: float,
    length_norm: str,
    per_row: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (sum of the loss [], the metrics SUMS [7], slope [T]), float32.

    `per_row` says whether reference_logprob holds one number per row or one per sequence.
    """
    num_pairs, num_rows = len(cu_seqlens) // 2, len(logprob)
    options = (label_prob, margin, weight, target)
    if triton:
        partials = logprob.new_empty(1 + len(SUMS), num_pairs, dtype=torch.float32)
        slope = logprob.new_empty(num_rows, dtype=torch.float32)
        tensors = contiguous(logprob, reference_logprob, cu_seqlens, mask, *options)
        modes, options = (kind, length_norm, per_row, _rows.BLOCK), {"num_warps": WARPS, **OPTIONS}
        with torch.cuda.device_of(logprob):
            pair_kernel[(num_pairs,)](*tensors, partials, slope, num_rows, beta, kappa, *modes, **options)
        return partials[0].sum(), partials[1:].sum(1), slope

    log_ratio = logprob = masked(logprob, mask)
    if reference_logprob is not None and per_row:
        log_ratio = logprob - masked(reference_logprob, mask)
    log_ratio, logprob, counts = (segment_sum(x, cu_seqlens).view(-1, 2) for x in (log_ratio, logprob, mask.float()))
    if reference_logprob is not None and not per_row:
        log_ratio = log_ratio - reference_logprob.float().view(-1, 2)
    valid = (counts > 0).all(1, keepdim=True)
    log_ratio, logprob = log_ratio.where(valid, 0), logprob.where(valid, 0)
    lengths = torch.ones_like(counts) if length_norm == "sum" else counts.clamp(min=1)
    if length_norm == "pair_mean":
        lengths = lengths.mean(1, keepdim=True).expand(-1, 2)
    normed = log_ratio / lengths

    label_prob, margin, weight, target = (None if x is None else x.float() for x in options)
    loss, *slope = torch_pair_terms(normed[:, 0], normed[:, 1], beta, kappa, label_prob, margin, target, kind)
    slope = torch.stack(slope, 1)
    if weight is not None:
        loss, slope = loss * weight, slope * weight[:, None]
    loss, slope = loss.where(valid[:, 0], 0), slope.where(valid, 0)
    slopes = (slope / lengths).flatten()
    rewards = beta * log_ratio
    right, margins = rewards[:, 0] > rewards[:, 1], rewards[:, 0] - rewards[:, 1]
    per_pair = (valid[:, 0].float(), right.float(), *rewards.unbind(1), margins, *logprob.unbind(1))
    slope_of_row = slopes[segment_of_row(cu_seqlens, num_rows)].where(mask, 0)
    return loss.sum(), torch.stack([x.sum() for x in per_pair]), slope_of_row


@_pair_loss.register_fake
def _(logprob, *_):
    return tuple(logprob.new_empty(shape, dtype=torch.float32) for shape in ((), len(SUMS), logprob.shape))


differentiate_by_slopes("fastrlhf::pair_loss", leaves=(0,))


@jit
def pair_kernel(
    logprob,
    reference_logprob,  # or None
    cu_seqlens,
    mask,
    label_prob,  # may be None, like each of the next three arguments
    margin,
    weight,
    target,
    partials,  # [8, B]: loss, SUMS
    slope,
    num_rows,
    beta,
    kappa,
    KIND: tl.constexpr,
    LENGTH_NORM: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    start, middle = segment_bounds(cu_seqlens, 2 * pair, num_rows)
    middle, stop = segment_bounds(cu_seqlens, 2 * pair + 1, num_rows)
    chosen, logprob_chosen, num_chosen = _member_sums(logprob, reference_logprob, mask, start, middle, PER_ROW, BLOCK)
    rejected, logprob_rejected, num_rejected = _member_sums(
        logprob, reference_logprob, mask, middle, stop, PER_ROW, BLOCK
    )
    if reference_logprob is not None and not PER_ROW:
        chosen -= tl.load(reference_logprob + 2 * pair).to(tl.float32)
        rejected -= tl.load(reference_logprob + 2 * pair + 1).to(tl.float32)
    valid = (num_chosen > 0) & (num_rejected > 0)
    length_chosen = tl.where(valid, num_chosen, 1.0)
    length_rejected = tl.where(valid, num_rejected, 1.0)
    if LENGTH_NORM == "sum":
        length_chosen = 1.0
        length_rejected = 1.0
    if LENGTH_NORM == "pair_mean":
        length_chosen = (length_chosen + length_rejected) * 0.5
        length_rejected = length_chosen

    if label_prob is not None:
        label_prob = tl.load(label_prob + pair).to(tl.float32)
    if margin is not None:
        margin = tl.load(margin + pair).to(tl.float32)
    if target is not None:
        target = tl.load(target + pair).to(tl.float32)
    normed_chosen = chosen / length_chosen
    normed_rejected = rejected / length_rejected
    loss, d_chosen, d_rejected = pair_terms(
        normed_chosen, normed_rejected, beta, kappa, label_prob, margin, target, KIND
    )
    if weight is not None:
        pair_weight = tl.load(weight + pair).to(tl.float32)
        loss *= pair_weight
        d_chosen *= pair_weight
        d_rejected *= pair_weight
    d_chosen = tl.where(valid, d_chosen, 0.0)
    d_rejected = tl.where(valid, d_rejected, 0.0)
    _spread(slope, d_chosen / length_chosen, mask, start, middle, BLOCK)
    _spread(slope, d_rejected / length_rejected, mask, middle, stop, BLOCK)

    reward_chosen = beta * chosen
    reward_rejected = beta * rejected
    _store(partials, 0, loss, valid)
    _store(partials, 1, 1.0, valid)
    _store(partials, 2, (reward_chosen > reward_rejected).to(tl.float32), valid)
    _store(partials, 3, reward_chosen, valid)
    _store(partials, 4, reward_rejected, valid)
    _store(partials, 5, reward_chosen - reward_rejected, valid)
    _store(partials, 6, logprob_chosen, valid)
    _store(partials, 7, logprob_rejected, valid)


@jit
def _member_sums(logprob, reference_logprob, mask, start, stop, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Returns (sum of the log-ratios, sum of the log-probs, number of rows) over a sequence's rows in the mask."""
    log_ratio = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        keep = tl.load(mask + rows, mask=rows < stop, other=0).to(tl.int1)
        current = load_float32(logprob, rows, keep)
        total += current
        if PER_ROW:
            current -= load_float32(reference_logprob, rows, keep)
        log_ratio += current
        count += keep.to(tl.float32)
    return tl.sum(log_ratio, 0), tl.sum(total, 0), tl.sum(count, 0)


@jit
def _spread(slope, value, mask, start, stop, BLOCK: tl.constexpr):
    """Writes `value` to those rows of a sequence that are in the mask and 0 to its other rows."""
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        keep = tl.load(mask + rows, mask=rows < stop, other=0).to(tl.int1)
        tl.store(slope + rows, tl.where(keep, value, 0.0), mask=rows < stop)


@jit
def _store(partials, index: tl.constexpr, value, valid):
    """Stores this pair's part of sum number `index`, or 0 for an invalid pair; `partials` is [8, B]."""
    tl.store(partials + index * tl.num_programs(0) + tl.program_id(0), tl.where(valid, value, 0.0))
