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
costs no dweight. Rows whose upstream gradients are all 0 (masked tokens, clipped ratios) are left out of the backward's
products; to count them, the backward waits once for a GPU, the forward never does.

On a GPU the Triton kernels of `_head_kernels.py` fold each tile of logits where it was computed; the backward stores
the gradient of a part of the logits, rounded once to bfloat16, and leaves the other two products to cuBLAS. It holds
that part (128 MiB, or 4096 T bytes where that is more) and a float32 dhidden.

Precision: products accumulate in float32, logits are never rounded, and all is relative to the largest logit of the
row, so that a constant added to every logit costs no digits. Results are float32.

Legend: T rows, V vocabulary, D hidden size. Online normaliser: Milakov and Gimelshein 2018 (arXiv 1805.02867); logits
that never exist: Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels import _head_kernels
from fastrlhf_kernels._blocks import Logits, Selection, add_product, exp_
from fastrlhf_kernels._checks import check_range, check_rows, check_tensor
from fastrlhf_kernels._triton import use_triton
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
    logprob, logsumexp, row_entropy, max_logprob, mean_logit, _, _ = _forward(
        hidden, weight, bias, targets, *transform, ignore_index, entropy, stats, use_triton(impl, device)
    )
    row_stats = (max_logprob, mean_logit) if stats else (None, None)
    return TokenLogprobs(logprob, logsumexp, row_entropy if entropy else None, *row_stats)


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


# Opaque operators: torch.compile sees neither the loops, whose number depends on T, nor the selection of rows.
@torch.library.custom_op("fastrlhf::linear_logprob", mutates_args=())
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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, logsumexp, entropy, max_logprob, mean_logit, peak, total), each [T] or, not asked for, empty.

    `peak` is the largest logit of the row, `total` the sum of exp(z - peak).
    """
    keep = targets != ignore
    chosen = Selection.of(keep, wait=False)
    if chosen.dead is None and keep.any():
        for extreme in targets[keep].aminmax():
            check_range("targets", int(extreme), 0, len(weight) - 1)
    transform = (temperature, scale, softcap)
    if triton:
        return _head_kernels.forward(hidden, weight, bias, targets, row_temperature, *transform, ignore, entropy, stats)
    row_temperature = None if row_temperature is None else chosen.take(row_temperature)
    logits = Logits.of(chosen.take(hidden), weight, bias, row_temperature, *transform)
    targets = chosen.take(targets)
    blocks = logits.row_blocks()
    state: list[tuple[Tensor, ...]] = [()] * len(blocks)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in logits.parts():
            for i, block in enumerate(blocks):
                state[i] = _fold(state[i], logits.block(block, part), targets[block] - part.start, entropy, stats)
    peak, total, target, gap, logit_sum = (torch.cat(pieces) for pieces in zip(*state, strict=True))
    log_total = total.log()
    empty = peak.new_empty(0)
    return (
        chosen.put_back(target - peak - log_total),  # never above 0: the peak is one of the logits, so total >= 1
        chosen.put_back(peak + log_total),
        chosen.put_back(log_total + gap / total) if entropy else empty,
        chosen.put_back(-log_total) if stats else empty.clone(),
        chosen.put_back(logit_sum / len(weight)) if stats else empty.clone(),
        chosen.put_back(peak),
        chosen.put_back(total),
    )


@_forward.register_fake
def _(hidden, weight, bias, targets, row_temperature, temperature, scale, softcap, ignore, entropy, stats, triton):
    asked = (True, True, entropy, stats, stats, True, True)
    return tuple(hidden.new_empty(len(targets) if wanted else 0, dtype=torch.float32) for wanted in asked)


def _save(ctx, inputs, output):
    """The inputs and four numbers per row."""
    hidden, weight, bias, targets, row_temperature, *transform, ignore, _, _, triton = inputs
    logprob, _, entropy, max_logprob, mean_logit, peak, total = output
    ctx.save_for_backward(hidden, weight, bias, targets, row_temperature, logprob, entropy, peak, total)
    ctx.options = (*transform, ignore, triton)
    ctx.mark_non_differentiable(max_logprob, mean_logit, peak, total)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprob, grad_logsumexp, grad_entropy, *_):
    needs = ctx.needs_input_grad[:3]
    grads = _backward(grad_logprob, grad_logsumexp, grad_entropy, *ctx.saved_tensors, *ctx.options, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 9


torch.library.register_autograd("fastrlhf::linear_logprob", _differentiate, setup_context=_save)


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
    triton: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; empty where not needed."""
    zero, keep = torch.zeros_like(logprob), targets != ignore
    upstream = [zero if grad is None else grad.where(keep, 0) for grad in (grad_logprob, grad_logsumexp, grad_entropy)]
    chosen = Selection.of((torch.stack(upstream) != 0).any(0), wait=True)
    dead = chosen.dead
    row_temperature = None if row_temperature is None else chosen.take(row_temperature)
    hidden = chosen.take(hidden if dead is None else hidden.masked_fill(dead, 0))
    targets = chosen.take(targets)
    per_row = (logprob, zero if grad_entropy is None else entropy, peak, total, *upstream)
    logprob, entropy, peak, total, g, on_total, on_entropy = (chosen.take(row) for row in per_row)
    # dx = slope * exp(z - peak) * (level - tilt * (z - peak)), and slope * at_target in the target's column
    factor = scale / (temperature if row_temperature is None else row_temperature)
    level = factor * (on_total - g - on_entropy * (entropy - total.log())) / total
    tilt = None if grad_entropy is None else factor * on_entropy / total
    at_target = factor * (
        on_total * logprob.exp() - g * logprob.expm1() - on_entropy * logprob.exp() * (logprob + entropy)
    )

    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if bias is not None and need_bias else None
    inputs = (hidden, weight, bias, targets, row_temperature, temperature, scale, softcap)
    run = _head_kernels.backward if triton and len(hidden) else _backward_blocks
    with torch.autocast(hidden.device.type, enabled=False):
        run(*inputs, dead, peak, level, tilt, at_target, grad_hidden, grad_weight, grad_bias)
    empty = logprob.new_empty(0)
    return (
        empty if grad_hidden is None else chosen.put_back(grad_hidden).to(hidden.dtype),
        empty.clone() if grad_weight is None else grad_weight,
        empty.clone() if grad_bias is None else grad_bias,
    )


def _backward_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    dead: Tensor | None,
    peak: Tensor,
    level: Tensor,
    tilt: Tensor | None,
    at_target: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Adds to grad_hidden, and fills grad_weight and grad_bias, as far as they are given."""
    peak, level, at_target = peak[:, None], level[:, None], at_target[:, None]
    tilt = None if tilt is None else tilt[:, None]
    logits = Logits.of(hidden, weight, bias, row_temperature, temperature, scale, softcap)
    blocks = logits.row_blocks()
    for part in logits.parts():
        stop = part.start + len(part.weight)
        weight_sum = None if grad_weight is None else torch.zeros_like(part.weight, dtype=torch.float32)
        bias_sum = None if grad_bias is None else grad_bias.new_zeros(len(part.weight), dtype=torch.float32)
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
            if grad_hidden is not None:
                add_product(grad_hidden[block], dx, part.weight)
            if weight_sum is not None:
                add_product(weight_sum, dx.T, logits.hidden[block])
        if grad_weight is not None and weight_sum is not None:
            grad_weight[part.start : stop] = weight_sum
        if grad_bias is not None and bias_sum is not None:
            grad_bias[part.start : stop] = bias_sum


@_backward.register_fake
def _(*args):
    given = (args[3], args[4], args[5])
    needs = args[-3:]
    return tuple(
        torch.empty_like(tensor) if need and tensor is not None else args[8].new_empty(0)
        for tensor, need in zip(given, needs, strict=True)
    )
