"""KL(policy || reference) of every token over the whole vocabulary, from hidden states, without the logits [T, V].

    z[t, v]   = softcap(logit_scale * (hidden[t] . weight[v] + bias[v])) / temperature,   p = softmax_v(z)
    z'[t, v]  = the logits of the reference, computed like z,                             q = softmax_v(z')
    kl        = sum_v p (log p - log q)

Gradient for an upstream gradient k of kl (for logprob and entropy see `linear_logprob`; the reference has no gradient):

    dz[t, v]  = k p ((z - z') - E_p[z - z'])

The op makes one pass over the vocabulary. Let m and m' be the largest logits of the row under policy and reference. It
keeps the totals S = sum exp(z - m), S' = sum exp(z' - m') and C = sum exp(z - m) ((z - m) - (z' - m')), and rescales
them when m or m' rises:

    kl        = C / S + log(S' / S),     dz = k exp(z - m) / S ((z - m) - (z' - m') - C / S)

A constant added to all logits of one model therefore costs no digits. If both models are equal, every difference is 0,
and kl and its gradient are exactly 0. If they are nearly equal, kl is a small difference of two numbers and has an
error of 2e-7 nats (plain float32: 7e-7; V = 20000). A negative kl is returned as 0, without changing the gradient.

A token that both models forbid with a bias of -inf does not count. If only the reference forbids a token, the true
divergence is infinite. The op then returns 1e30 p, with an equally large gradient, so that the error is noticed.

The op works in blocks like `linear_logprob`, one block of each model at a time. Beyond the returned gradients it holds
about 4 (5 ROWS VOCAB + VOCAB (2 D + Dr)) bytes, and 8 T D + 4 T Dr more in half precision; on a GPU 128 MiB and a
float32 dhidden, like `linear_logprob`. The backward recomputes the logits of both models (6 products in all), unless kl
has no upstream gradient. It skips rows without an upstream gradient; counting them waits once for a GPU.

Legend: T rows, V vocabulary, D and Dr hidden sizes. Reasons not to differentiate a sampled estimate: Tang and Munos
2025 (arXiv 2506.09477).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastrlhf_kernels import _kl_kernels
from fastrlhf_kernels._blocks import (
    LOWEST,
    Logits,
    Part,
    Selection,
    exp_,
    fold,
    gradient,
    gradients_like,
    multiply_parts,
    slopes,
)
from fastrlhf_kernels._checks import check_first_derivative, check_rows, check_tensor
from fastrlhf_kernels._head import FAR
from fastrlhf_kernels._kl_kernels import Head, Slopes, Transform
from fastrlhf_kernels._triton import use_triton
from fastrlhf_kernels.linear_logprob import _backward as logprob_backward
from fastrlhf_kernels.linear_logprob import check_rows_that_count, checked_transform
from fastrlhf_kernels.types import TokenKL

IGNORE = -100


def linear_kl(
    hidden: Tensor,  # [T, D] float32, bfloat16 or float16
    weight: Tensor,  # [V, D]
    reference_hidden: Tensor,  # [T, Dr]; no gradient
    reference_weight: Tensor,  # [V, Dr]; no gradient
    *,
    targets: Tensor | None = None,  # [T] int64
    bias: Tensor | None = None,  # [V]
    reference_bias: Tensor | None = None,  # [V]; no gradient
    temperature: float | Tensor = 1.0,  # of both models: a number or [T]; no gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    impl: str = "auto",
) -> TokenKL:
    """Returns the exact KL between policy and reference, sum_v p (log p - log q), of every row, from the hidden states
    of both models.

    p and q are softmax(softcap(logit_scale * (h @ w.T + b)) / temperature). With `targets`, the result also holds the
    log-probs of the targets under both models. A row whose target is -100 returns 0 in every output and has no
    gradient, even if it contains NaN. Raises ValueError for wrong shapes, dtypes and devices, and on the CPU for a
    target outside the vocabulary and a row's temperature that is not above 0 (on a GPU these give NaN).
    """
    check_rows("hidden", hidden, rank=2)
    check_rows("reference_hidden", reference_hidden, rank=2)
    targeted = targets is not None
    if targets is None:  # use token 0; its log-probs are discarded below
        targets = hidden.new_zeros(hidden.shape[:1], dtype=torch.int64)
    transform = checked_transform(hidden, weight, targets, bias, temperature, logit_scale, softcap)
    num_rows, vocab, device = hidden.shape[0], weight.shape[0], hidden.device
    check_tensor("reference_hidden", reference_hidden, (num_rows, reference_hidden.shape[1]), device)
    check_tensor("reference_weight", reference_weight, (vocab, reference_hidden.shape[1]), device)
    if reference_bias is not None:
        check_tensor("reference_bias", reference_bias, (vocab,), device)
        reference_bias = reference_bias.detach()
    reference = (reference_hidden.detach(), reference_weight.detach(), reference_bias)
    kl, logprob, reference_logprob, row_entropy, *_ = _forward(
        hidden, weight, bias, *reference, targets, *transform, entropy, use_triton(impl, device)
    )
    logprobs = (logprob, reference_logprob) if targeted else (None, None)
    return TokenKL(kl, *logprobs, row_entropy if entropy else None)


def linear_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenKL:
    """Computes the KL by its definition, from all logits at once, in the dtype of the inputs."""

    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)).log_softmax(-1)

    logp = log_softmax(hidden, weight, bias)
    logq = log_softmax(reference_hidden, reference_weight, reference_bias).detach()
    kl, entropy = (logp.exp() * (logp - logq)).sum(-1), -(logp.exp() * logp).sum(-1)
    if targets is None:
        return TokenKL(kl, None, None, entropy)
    keep = targets != IGNORE
    logprob, reference_logprob = (x.gather(1, targets.where(keep, 0)[:, None])[:, 0] for x in (logp, logq))
    return TokenKL(*(row.where(keep, 0) for row in (kl, logprob, reference_logprob, entropy)))


# A custom operator is opaque to torch.compile, which could not trace row selection or loop counts that depend on T.
@torch.library.custom_op("fastrlhf::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    entropy: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (kl, logprob, reference_logprob, entropy, peak, total, reference_peak, drift), [T] each.

    `entropy` is empty unless requested. `peak` is the largest logit of the row, `total` the sum of exp(z - peak),
    `drift` the mean of (z - peak) - (z' - reference_peak) under the policy.
    """
    keep = targets != IGNORE
    chosen = Selection.of(keep, wait=False)
    check_rows_that_count(chosen, targets, len(weight), row_temperature)
    policy, reference = Head(hidden, weight, bias), Head(reference_hidden, reference_weight, reference_bias)
    if triton:
        transform = (row_temperature, temperature, scale, softcap)
        with torch.cuda.device_of(hidden):
            return _kl_kernels.forward(policy, reference, targets, transform, IGNORE, entropy)
    transform = (None if row_temperature is None else chosen.take(row_temperature), temperature, scale, softcap)
    targets = chosen.take(targets)
    logits, reference_logits = (
        Logits.of(*side._replace(hidden=chosen.take(side.hidden)), *transform) for side in (policy, reference)
    )
    blocks = logits.row_blocks()
    state: list[tuple[Tensor, ...]] = [()] * len(blocks)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, reference_part in zip(logits.parts(), reference_logits.parts(), strict=True):
            for i, block in enumerate(blocks):
                z, y = logits.block(block, part), reference_logits.block(block, reference_part)
                state[i] = _fold(state[i], z, y, targets[block] - part.start, entropy)
    cross, peak, total, target, gap, _, reference_peak, reference_total, reference_target, *_ = (
        torch.cat(pieces) for pieces in zip(*state, strict=True)
    )
    drift, log_total = cross / total, total.log()
    return (
        chosen.put_back((drift + (reference_total / total).log()).clamp_(min=0)),
        chosen.put_back(target - peak - log_total),
        chosen.put_back(reference_target - reference_peak - reference_total.log()),
        chosen.put_back(log_total + gap / total) if entropy else peak.new_empty(0),
        chosen.put_back(peak),
        chosen.put_back(total),
        chosen.put_back(reference_peak),
        chosen.put_back(drift),
    )


@_forward.register_fake
def _(*args):
    hidden, entropy = args[0], args[-2]
    asked = (True, True, True, entropy, True, True, True, True)
    return tuple(hidden.new_empty(hidden.shape[0] if wanted else 0, dtype=torch.float32) for wanted in asked)


def _save(ctx, inputs, output):
    """Saves the inputs and six numbers per row for the backward."""
    *tensors, temperature, scale, softcap, _, triton = inputs
    _, logprob, reference_logprob, entropy, *rows = output
    ctx.save_for_backward(*tensors, logprob, entropy, *rows)
    ctx.options = (temperature, scale, softcap, triton)
    ctx.mark_non_differentiable(reference_logprob, *rows)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_kl, grad_logprob, _, grad_entropy, *__):
    check_first_derivative("linear_kl")
    needs, (*transform, triton) = ctx.needs_input_grad[:3], ctx.options
    if grad_kl is None:  # kl has no upstream gradient
        *policy, _, _, _, targets, row_temperature, logprob, entropy, peak, total, _, _ = ctx.saved_tensors
        saved = (*policy, targets, row_temperature, logprob, entropy, peak, total)
        grads = logprob_backward(grad_logprob, None, grad_entropy, *saved, *transform, IGNORE, triton, True, *needs)
    else:
        grads = _backward(grad_kl, grad_logprob, grad_entropy, *ctx.saved_tensors, *transform, triton, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 10


torch.library.register_autograd("fastrlhf::linear_kl", _differentiate, setup_context=_save)


def _fold(state: tuple[Tensor, ...], z: Tensor, y: Tensor, column: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Updates the running statistics over the vocabulary with logits z (policy) and y (reference) of one more block.

    `state` is () for the first block. Returns (cross, statistics of `fold` for the policy, and for the reference),
    [rows] each or empty, with cross = sum exp(z - peak) ((z - peak) - (y - reference_peak)).
    """
    policy, reference = (
        fold(state[1:6], z.clone(), column, entropy, False),
        fold(state[6:], y.clone(), column, False, False),
    )
    z, y = _relative(z, policy[0]), _relative(y, reference[0])
    cross = exp_(z.clone()).mul_(z.sub_(y)).sum(1)
    if state:
        rise, reference_rise = policy[0] - state[1], reference[0] - state[6]
        cross += (-rise).exp() * (state[0] + (reference_rise - rise) * state[2])
    return cross, *policy, *reference


def _relative(z: Tensor, peak: Tensor) -> Tensor:
    """Subtracts the peak of each row from z in place; -inf becomes LOWEST, which is finite."""
    return z.sub_(peak[:, None]).clamp_(min=LOWEST)


@torch.library.custom_op("fastrlhf::linear_kl_backward", mutates_args=())
def _backward(
    grad_kl: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    peak: Tensor,
    total: Tensor,
    reference_peak: Tensor,
    drift: Tensor,
    temperature: float,
    scale: float,
    softcap: float | None,
    triton: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of hidden, weight and bias in their dtypes; a gradient that is not needed is empty."""
    zero, keep = torch.zeros_like(logprob), targets != IGNORE
    upstream = [zero if grad is None else grad.where(keep, 0) for grad in (grad_kl, grad_logprob, grad_entropy)]
    chosen = Selection.of((torch.stack(upstream) != 0).any(0), wait=True)
    take = partial(chosen.take, filler=0)
    on_kl, g, on_entropy, logprob, drift = map(take, (*upstream, logprob, drift))
    total = chosen.take(total, 1)
    row_temperature = None if row_temperature is None else chosen.take(row_temperature, 1)
    factor = scale / (temperature if row_temperature is None else row_temperature)
    bonus = (None, None) if grad_entropy is None else (on_entropy, take(entropy))
    level, tilt, at_target = slopes(g, -on_kl * drift, bonus[0], factor, logprob, bonus[1], total)
    rows = Slopes(chosen.take(peak, FAR), level, tilt, at_target, take(reference_peak), factor * on_kl / total)

    policy = Head(take(hidden), weight, bias)
    reference = Head(take(reference_hidden), reference_weight, reference_bias)
    transform = (row_temperature, temperature, scale, softcap)
    grad_hidden = policy.hidden.new_zeros(policy.hidden.shape, dtype=torch.float32) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if bias is not None and need_bias else None
    run = _kl_kernels.backward if triton and len(policy.hidden) else _backward_blocks
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        run(policy, reference, take(targets), transform, rows, grad_hidden, grad_weight, grad_bias)
    empty = logprob.new_empty(0)
    return (
        empty if grad_hidden is None else chosen.put_back(grad_hidden.to(hidden.dtype)),
        empty.clone() if grad_weight is None else grad_weight,
        empty.clone() if grad_bias is None else grad_bias,
    )


def _backward_blocks(
    policy: Head,
    reference: Head,
    targets: Tensor,
    transform: Transform,
    rows: Slopes,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Adds to grad_hidden and overwrites grad_weight and grad_bias, block by block; None gradients are skipped."""
    logits, reference_logits = Logits.of(*policy, *transform), Logits.of(*reference, *transform)

    def dx(part: Part, reference_part: Part, block: slice) -> Tensor:
        z, y = logits.block(block, part), reference_logits.block(block, reference_part)
        slope = None if logits.softcap is None else logits.slope(block, z)
        own = Slopes(*(None if row is None else row[block] for row in rows))  # pyright: ignore[reportArgumentType]
        dx = gradient(z.clone(), targets[block] - part.start, own.peak, own.level, own.tilt, own.at_target)
        z, y = _relative(z, own.peak), _relative(y, own.reference_peak)
        dx += exp_(z.clone()).mul_(z.sub_(y)).mul_(own.pull[:, None])
        return dx if slope is None else dx.mul_(slope)

    both = zip(logits.parts(), reference_logits.parts(), strict=True)
    parts = ((part, partial(dx, part, reference_part)) for part, reference_part in both)
    multiply_parts(logits, parts, grad_hidden, grad_weight, grad_bias)


@_backward.register_fake
def _(*args):
    return gradients_like(args[3:6], args[-3:], args[11])
