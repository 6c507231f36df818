"""Log-probs of given tokens, computed from hidden states and the head's weight without storing the logits [T, V].

    z[t, v]   = softcap(logit_scale * (hidden[t] . weight[v] + bias[v])) / temperature,   softcap(x) = c tanh(x / c)
    logprob   = z[t, y_t] - logsumexp_v z[t, v]
    entropy   = -sum_v p log p,   p = softmax(z[t])

Gradient, for upstream gradients g of logprob, l of logsumexp and e of entropy:

    dz[t, v]  = g (1[v = y_t] - p) + l p - e p (log p + entropy)
    dx        = dz * softcap'(x) * logit_scale / temperature,   dhidden = dx @ weight,   dweight = dx.T @ hidden

The target's entry is computed as -expm1(logprob) g, because 1 - p loses digits when p is nearly 1.

A block of ROWS x VOCAB logits is computed, reduced to running statistics and discarded. The backward computes the
logits again (4 products in all; storing the logits needs 3). Beyond the returned gradients the op holds about
4 (2 VOCAB D + 3 ROWS VOCAB) bytes, and 8 T D more in half precision; log_softmax holds 12 T V. A frozen weight costs no
dweight. The backward skips rows whose upstream gradients are all 0 (masked tokens, clipped ratios). To find them it
waits once for a GPU, unless `skip_rows` is off; the forward never waits.

On a GPU the Triton kernels of `_head_kernels.py` reduce each tile of logits in registers. The backward stores the
gradient of a part of the logits, rounded once to bfloat16, and cuBLAS computes the two products with it. It holds this
part (128 MiB, or 4096 T bytes if that is more), a float32 dhidden and, if rows are skipped, a copy of the other rows.

Precision: products accumulate in float32, logits are never rounded, and all sums are relative to the largest logit of
the row, so that a constant added to every logit costs no digits. Results are float32.

Legend: T rows, V vocabulary, D hidden size. Online normaliser: Milakov and Gimelshein 2018 (arXiv 1805.02867); losses
without stored logits: Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastrlhf_kernels import _head
from fastrlhf_kernels._blocks import Logits, Part, Selection, fold, gradient, gradients_like, multiply_parts, slopes
from fastrlhf_kernels._checks import check_first_derivative, check_range, check_rows, check_tensor
from fastrlhf_kernels._triton import use_triton
from fastrlhf_kernels.types import TokenLogprobs


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
    skip_rows: bool = True,
    impl: str = "auto",
) -> TokenLogprobs:
    """Returns log-probs of `targets` under the language-model head applied to `hidden`, [T] float32, in nats. They are
    log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[t, targets[t]]. A row whose target is
    `ignore_index` returns 0 in every output and has no gradient, even if it contains NaN. With `skip_rows` the backward
    leaves out rows without a gradient; to count them the host waits once for a GPU, so pass False if nearly all rows
    have a gradient. On a CPU these rows are always left out. Raises ValueError for wrong shapes, dtypes and devices,
    and on the CPU for a target outside the vocabulary and a row's temperature that is not above 0 (on a GPU these give
    NaN).
    """
    transform = checked_transform(hidden, weight, targets, bias, temperature, logit_scale, softcap)
    logprob, logsumexp, row_entropy, max_logprob, mean_logit, _, _ = _forward(
        hidden,
        weight,
        bias,
        targets,
        *transform,
        ignore_index,
        entropy,
        stats,
        use_triton(impl, hidden.device),
        skip_rows,
    )
    row_stats = (max_logprob, mean_logit) if stats else (None, None)
    return TokenLogprobs(logprob, logsumexp, row_entropy if entropy else None, *row_stats)


def checked_transform(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor | None, float, float, float | None]:
    """Checks the arguments of a head; returns (temperature per row, temperature, scale, soft cap).

    Raises ValueError for bad arguments.
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
        row_temperature, temperature = positive_or_nan(temperature).contiguous(), 1.0
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None:
            check_range(name, value, 0, float("inf"), open_ends=True)

    return row_temperature, float(temperature), float(logit_scale), softcap


def positive_or_nan(temperature: Tensor) -> Tensor:
    """Returns the temperatures as [T] float32, with NaN for invalid values, because raising an error would make a GPU
    wait."""
    temperature = temperature.detach().float()
    return temperature.where(temperature > 0, float("nan"))


def check_rows_that_count(chosen: Selection, targets: Tensor, vocab: int, row_temperature: Tensor | None) -> None:
    """Raises ValueError if a live row has a target outside the vocabulary or a temperature of NaN.

    On a GPU nothing is checked, because the check would wait for the device.
    """
    if chosen.dead is not None or not chosen.live.any():
        return
    for extreme in chosen.take(targets).aminmax():
        check_range("targets", int(extreme), 0, vocab - 1)
    if row_temperature is not None and chosen.take(row_temperature).isnan().any():
        raise ValueError("temperature must be above 0 in every row that is not ignored")


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
    """Computes the log-probs by their definition, from all logits at once, in the dtype of the inputs."""
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logprobs, keep = logits.log_softmax(-1), targets != ignore_index
    logprob = logprobs.gather(1, targets.where(keep, 0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    rows = (logprob, logits.logsumexp(-1), entropy, logprobs.detach().amax(-1), logits.detach().mean(-1))
    return TokenLogprobs(*(row.where(keep, 0) for row in rows))


# A custom operator is opaque to torch.compile, which could not trace row selection or loop counts that depend on T.
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
    skip_rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (logprob, logsumexp, entropy, max_logprob, mean_logit, peak, total), [T] each; empty if not requested.

    `peak` is the largest logit of the row, `total` the sum of exp(z - peak).
    """
    keep = targets != ignore
    chosen = Selection.of(keep, wait=False)
    check_rows_that_count(chosen, targets, len(weight), row_temperature)
    transform = (temperature, scale, softcap)
    if triton:
        with torch.cuda.device_of(hidden):
            return _head.forward(hidden, weight, bias, targets, row_temperature, *transform, ignore, entropy, stats)
    row_temperature = None if row_temperature is None else chosen.take(row_temperature)
    logits = Logits.of(chosen.take(hidden), weight, bias, row_temperature, *transform)
    targets = chosen.take(targets)
    blocks = logits.row_blocks()
    state: list[tuple[Tensor, ...]] = [()] * len(blocks)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in logits.parts():
            for i, block in enumerate(blocks):
                state[i] = fold(state[i], logits.block(block, part), targets[block] - part.start, entropy, stats)
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
def _(hidden, weight, bias, targets, row_temperature, temperature, scale, softcap, ignore, entropy, stats, *_):
    asked = (True, True, entropy, stats, stats, True, True)
    return tuple(hidden.new_empty(targets.shape[0] if wanted else 0, dtype=torch.float32) for wanted in asked)


def _save(ctx, inputs, output):
    """Saves the inputs and four numbers per row for the backward."""
    hidden, weight, bias, targets, row_temperature, *transform, ignore, _, _, triton, skip_rows = inputs
    logprob, _, entropy, max_logprob, mean_logit, peak, total = output
    ctx.save_for_backward(hidden, weight, bias, targets, row_temperature, logprob, entropy, peak, total)
    ctx.options = (*transform, ignore, triton, skip_rows)
    ctx.mark_non_differentiable(max_logprob, mean_logit, peak, total)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprob, grad_logsumexp, grad_entropy, *_):
    check_first_derivative("linear_logprob")
    needs = ctx.needs_input_grad[:3]
    grads = _backward(grad_logprob, grad_logsumexp, grad_entropy, *ctx.saved_tensors, *ctx.options, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 10


torch.library.register_autograd("fastrlhf::linear_logprob", _differentiate, setup_context=_save)


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
    skip_rows: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of hidden, weight and bias in their dtypes; a gradient that is not needed is empty."""
    zero, keep = torch.zeros_like(logprob), targets != ignore
    upstream = [zero if grad is None else grad.where(keep, 0) for grad in (grad_logprob, grad_logsumexp, grad_entropy)]
    chosen = Selection.of((torch.stack(upstream) != 0).any(0), wait=skip_rows)
    dead = chosen.dead
    row_temperature = None if row_temperature is None else chosen.take(row_temperature, 1)
    hidden, targets = chosen.take(hidden, 0), chosen.take(targets)
    logprob, peak, total, g, on_logsumexp, on_entropy = map(chosen.take, (logprob, peak, total, *upstream))
    factor = scale / (temperature if row_temperature is None else row_temperature)
    if grad_entropy is None:
        rows = slopes(g, on_logsumexp, None, factor, logprob, None, total)
    else:
        rows = slopes(g, on_logsumexp, on_entropy, factor, logprob, chosen.take(entropy), total)

    grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if bias is not None and need_bias else None
    inputs = (hidden, weight, bias, targets, row_temperature, temperature, scale, softcap)
    run = _head.backward if triton and len(hidden) else _backward_blocks
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        run(*inputs, dead, peak, *rows, grad_hidden, grad_weight, grad_bias)
    empty = logprob.new_empty(0)
    return (
        empty if grad_hidden is None else chosen.put_back(grad_hidden.to(hidden.dtype)),
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
    """Adds to grad_hidden and overwrites grad_weight and grad_bias, block by block; None gradients are skipped."""
    logits = Logits.of(hidden, weight, bias, row_temperature, temperature, scale, softcap)

    def dx(part: Part, block: slice) -> Tensor:
        z = logits.block(block, part)
        slope = None if softcap is None else logits.slope(block, z)
        own = (None if row is None else row[block] for row in (peak, level, tilt, at_target))
        dx = gradient(z, targets[block] - part.start, *own)  # pyright: ignore[reportArgumentType]
        if slope is not None:
            dx *= slope
        return dx if dead is None else dx.masked_fill_(dead[block], 0)

    parts = ((part, partial(dx, part)) for part in logits.parts())
    multiply_parts(logits, parts, grad_hidden, grad_weight, grad_bias)


@_backward.register_fake
def _(*args):
    return gradients_like(args[3:6], args[-3:], args[8])
