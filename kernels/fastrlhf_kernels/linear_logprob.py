"""Log-probs of given tokens, from hidden states and the head's weight, without the logits [T, V].

    z[t, v]   = softcap(logit_scale * (hidden[t] . weight[v] + bias[v])) / temperature,   softcap(x) = c tanh(x / c)
    logprob   = z[t, y_t] - logsumexp_v z[t, v]
    entropy   = -sum_v p log p,   p = softmax(z[t])

Gradient, for upstream gradients g of logprob, l of logsumexp and e of entropy:

    dz[t, v]  = g (1[v = y_t] - p) + l p - e p (log p + entropy)
    dx        = dz * softcap'(x) * logit_scale / temperature,   dhidden = dx @ weight,   dweight = dx.T @ hidden

The target's entry is computed as -expm1(logprob) g: 1 - p has fewer correct digits than logprob where p is nearly 1.

A block of ROWS x VOCAB logits is computed, folded into running statistics and forgotten; the backward computes it by
the same products again (4 in all, where storing needs 3). Beyond the returned gradients this holds about
4 (2 VOCAB D + 3 ROWS VOCAB) bytes, and 8 T D more for half precision, where log_softmax holds 12 T V; a frozen weight
costs no dweight. Rows that are ignored, or whose upstream gradients are all 0 (masked tokens, clipped ratios), are left
out of the products on the CPU; on a GPU, counting them would wait for it.

Precision: products accumulate in float32, logits are never rounded, and all is relative to the largest logit of the
row, so that a constant added to every logit costs no digits. Results are float32.

Legend: T rows, V vocabulary, D hidden size. Online normaliser: Milakov and Gimelshein 2018 (arXiv 1805.02867); logits
that never exist: Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import Logits, Selection, add_product, exp_
from fastrlhf_kernels._checks import check_impl, check_range, check_rows, check_tensor
from fastrlhf_kernels.types import TokenLogprobs

LOWEST = -1e30  # stands for the peak of a block whose logits are all -inf, where -inf - -inf would be NaN
VANISHED = -1e4  # its exp is 0 as that of -inf is, and 0 times it is not NaN


def linear_logprob(
    hidden: Tensor,  # [T, D] float32, bfloat16 or float16
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number or [T]; no gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    stats: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
) -> TokenLogprobs:
    """log softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[t, targets[t]], float32, in nats.

    Rows whose target is `ignore_index` give 0 in every output and no gradient, whatever lies in them. Raises ValueError
    for wrong shapes, dtypes and devices, and on the CPU for a target outside the vocabulary (on a GPU it gives NaN).
    """
    check_impl(impl)
    check_rows("hidden", hidden, rank=2)
    check_rows("weight", weight, rank=2)
    (num_rows, size), vocab, device = hidden.shape, weight.shape[0], hidden.device
    if vocab == 0:
        raise ValueError("weight must have at least one row, got none")
    check_tensor("weight", weight, (vocab, size), device)
    check_tensor("targets", targets, (num_rows,), device, (torch.int64,))
    if bias is not None:
        check_tensor("bias", bias, (vocab,), device)
    row_temperature = None
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (num_rows,), device)
        row_temperature, temperature = temperature.detach().float(), 1.0
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None:
            check_range(name, value, 0, float("inf"), open_low=True)

    transform = (row_temperature, float(temperature), float(logit_scale), softcap)
    logprob, logsumexp, row_entropy, *row_stats = _LinearLogprob.apply(
        hidden, weight, bias, targets, *transform, ignore_index, entropy, stats
    )
    return TokenLogprobs(logprob, logsumexp, row_entropy if entropy else None, *(row_stats if stats else (None, None)))


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """The definition: all logits at once, in the dtype given."""
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logprobs, keep = logits.log_softmax(-1), targets != ignore_index
    logprob = logprobs.gather(1, targets.where(keep, 0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    rows = (logprob, logits.logsumexp(-1), entropy, logprobs.detach().amax(-1), logits.detach().mean(-1))
    return TokenLogprobs(*(row.where(keep, 0) for row in rows))


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and four numbers per row."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, row_temperature, temperature, scale, softcap, ignore, entropy, stats
    ):
        transform = (temperature, scale, softcap, ignore)
        *outputs, peak, total = _forward(hidden, weight, bias, targets, row_temperature, *transform, entropy, stats)
        logprob, _, row_entropy, max_logprob, mean_logit = outputs
        ctx.save_for_backward(hidden, weight, bias, targets, row_temperature, logprob, row_entropy, peak, total)
        ctx.transform = transform
        ctx.mark_non_differentiable(max_logprob, mean_logit)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_logprob, grad_logsumexp, grad_entropy, *_):
        needs = ctx.needs_input_grad[:3]
        grads = _backward(grad_logprob, grad_logsumexp, grad_entropy, *ctx.saved_tensors, *ctx.transform, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 8


# Opaque operators: torch.compile sees neither the loops, whose number depends on T, nor the selection of rows.
@torch.library.custom_op("fastrlhf::linear_logprob_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    ignore: int,
    entropy: bool,
    stats: bool,
) -> list[Tensor]:
    """[logprob, logsumexp, entropy, max_logprob, mean_logit, peak, total], each [T] or, not asked for, empty.

    `peak` is the largest logit of the row, `total` the sum of exp(z - peak).
    """
    keep = targets != ignore
    chosen = Selection.of(keep)
    row_temperature = None if row_temperature is None else chosen.take(row_temperature)
    logits = Logits.of(chosen.take(hidden), weight, bias, row_temperature, temperature, scale, softcap)
    targets = chosen.take(targets)
    if chosen.dead is None and len(targets):
        for extreme in targets.aminmax():
            check_range("targets", int(extreme), 0, len(weight) - 1)
    blocks = logits.row_blocks()
    state: list[tuple[Tensor, ...]] = [()] * len(blocks)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in logits.parts():
            for i, block in enumerate(blocks):
                state[i] = _fold(state[i], logits.block(block, part), targets[block] - part.start, entropy, stats)
    peak, total, target, gap, logit_sum = (torch.cat(pieces) for pieces in zip(*state, strict=True))
    log_total = total.log()
    outputs = (
        target - peak - log_total,  # never above 0: the peak is one of the logits, so total is at least 1
        peak + log_total,
        log_total + gap / total if entropy else None,
        -log_total if stats else None,
        logit_sum / len(weight) if stats else None,
        peak,
        total,
    )
    return [peak.new_empty(0) if output is None else chosen.put_back(output) for output in outputs]


@_forward.register_fake
def _(hidden, weight, bias, targets, row_temperature, temperature, scale, softcap, ignore, entropy, stats):
    asked = (True, True, entropy, stats, stats, True, True)
    return [hidden.new_empty(len(targets) if wanted else 0, dtype=torch.float32) for wanted in asked]


def _fold(state: tuple[Tensor, ...], z: Tensor, column: Tensor, entropy: bool, stats: bool) -> tuple[Tensor, ...]:
    """Statistics of the vocabulary so far with one more block z, which is overwritten; `state` is () at the first.

    (peak, total, target logit, gap = sum exp(z - peak) (peak - z), sum of logits), [rows] each or empty if not wanted.
    """
    inside, index = _locate(column, z)
    target = z.gather(1, index)[:, 0].where(inside, float("nan"))
    logit_sum = z.sum(1) if stats else z.new_empty(0)
    peak = z.amax(1).clamp_(min=LOWEST)
    z -= peak[:, None]
    if entropy:
        mass = exp_(z.clamp_(min=VANISHED).clone())
        total, gap = mass.sum(1), -mass.mul_(z).sum(1)
    else:
        total, gap = exp_(z).sum(1), z.new_empty(0)
    if not state:
        return peak, total, target, gap, logit_sum

    old_peak, old_total, old_target, old_gap, old_sum = state
    top = torch.maximum(peak, old_peak)
    new, old = (peak - top).exp(), (old_peak - top).exp()
    if entropy:
        gap = new * (gap + (top - peak) * total) + old * (old_gap + (top - old_peak) * old_total)
    return top, new * total + old * old_total, target.where(inside, old_target), gap, logit_sum + old_sum


def _locate(column: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Where the target lies in this block: [rows] bool, and an index [rows, 1] that is valid in every row."""
    width = z.shape[1]
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


@torch.library.custom_op("fastrlhf::linear_logprob_backward", mutates_args=())
def _backward(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    peak: Tensor,
    total: Tensor,
    temperature: float,
    scale: float,
    softcap: float | None,
    ignore: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; empty where not needed."""
    zero, keep = torch.zeros_like(logprob), targets != ignore
    upstream = [zero if grad is None else grad.where(keep, 0) for grad in (grad_logprob, grad_logsumexp, grad_entropy)]
    chosen = Selection.of((torch.stack(upstream) != 0).any(0))
    dead = chosen.dead
    row_temperature = None if row_temperature is None else chosen.take(row_temperature)
    live_hidden = chosen.take(hidden if dead is None else hidden.masked_fill(dead, 0))
    logits = Logits.of(live_hidden, weight, bias, row_temperature, temperature, scale, softcap)
    targets = chosen.take(targets)
    per_row = (logprob, zero if grad_entropy is None else entropy, peak, total, *upstream)
    logprob, entropy, peak, total, g, on_total, on_entropy = (chosen.take(row)[:, None] for row in per_row)
    factor = scale / logits.temperature
    # dx = slope * exp(z - peak) * (level - tilt * (z - peak)), and slope * at_target in the target's column
    level = factor * (on_total - g - on_entropy * (entropy - total.log())) / total
    tilt = None if grad_entropy is None else factor * on_entropy / total
    at_target = factor * (
        on_total * logprob.exp() - g * logprob.expm1() - on_entropy * logprob.exp() * (logprob + entropy)
    )

    grad_hidden = torch.zeros_like(live_hidden, dtype=torch.float32) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else hidden.new_empty(0)
    grad_bias = torch.empty_like(bias) if bias is not None and need_bias else hidden.new_empty(0)
    blocks = logits.row_blocks()
    with torch.autocast(hidden.device.type, enabled=False):
        for part in logits.parts():
            stop = part.start + len(part.weight)
            weight_sum = torch.zeros_like(part.weight, dtype=torch.float32) if need_weight else None
            bias_sum = torch.zeros_like(part.bias) if part.bias is not None and need_bias else None
            for block in blocks:
                z = logits.block(block, part)
                slope = None if softcap is None else logits.slope(block, z)
                z -= peak[block]
                if tilt is None:
                    dx = exp_(z).mul_(level[block])
                else:
                    dx = exp_(z.clamp_(min=VANISHED).clone()).mul_(z.mul_(-tilt[block]).add_(level[block]))
                inside, index = _locate(targets[block] - part.start, dx)
                dx.scatter_(1, index, at_target[block].where(inside[:, None], dx.gather(1, index)))
                if slope is not None:
                    dx *= slope
                if dead is not None:
                    dx.masked_fill_(dead[block], 0)
                if bias_sum is not None:
                    bias_sum += dx.sum(0)
                dx = dx.to(logits.hidden.dtype)
                if need_hidden:
                    add_product(grad_hidden[block], dx, part.weight)
                if weight_sum is not None:
                    add_product(weight_sum, dx.T, logits.hidden[block])
            if weight_sum is not None:
                grad_weight[part.start : stop] = weight_sum
            if bias_sum is not None:
                grad_bias[part.start : stop] = bias_sum
    if need_hidden:
        grad_hidden = chosen.put_back(grad_hidden).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


@_backward.register_fake
def _(*args):
    given = (args[3], args[4], args[5])
    needs = args[-3:]
    return tuple(
        torch.empty_like(tensor) if need and tensor is not None else args[3].new_empty(0)
        for tensor, need in zip(given, needs, strict=True)
    )
