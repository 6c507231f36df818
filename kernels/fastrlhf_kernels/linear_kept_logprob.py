"""Log-probs of given tokens under a softmax that is restricted to a set of tokens per row (truncated sampling).

    z[t, v]   = softcap(logit_scale * (hidden[t] . weight[v] + bias[v])) / temperature,   softcap(x) = c tanh(x / c)
    logprob   = z[t, y_t] - logsumexp_{v in S_t} z[t, v]
    entropy   = -sum_{v in S_t} p log p,   p = softmax of z[t] over S_t

S_t is the set of tokens that truncated sampling (top-k, top-p, min-p) kept at row t. It is a constant: the gradient is
that of a softmax over S_t, so a ratio of two policies compares distributions with equal support (DeepSeek-AI 2025,
arXiv 2512.02556, "Keep Sampling Mask").

The op works on chunks of rows. It computes only the logits of the union of a chunk's sets, [rows, union] float32, and
discards them; the backward computes them again. A row costs at most as much as in `linear_logprob`, and far less if the
sets are small. There is no Triton kernel; on a GPU cuBLAS computes the products. The size of the unions is read on the
host, so every chunk waits for a GPU.

Legend: T rows, V vocabulary, D hidden size, K the sum of the sizes of the sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import gradients_like
from fastrlhf_kernels._checks import check_cu_seqlens, check_first_derivative, check_range, check_tensor
from fastrlhf_kernels.linear_logprob import checked_transform
from fastrlhf_kernels.types import TokenLogprobs

CPU_CHUNK, GPU_CHUNK = 1 << 25, 1 << 28  # largest size of a chunk's logits in bytes, unless one row is larger


def linear_kept_logprob(
    hidden: Tensor,  # [T, D] float32, bfloat16 or float16
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    kept: Tensor,  # [K] int64, the tokens of all sets, row after row
    cu_kept: Tensor,  # (T+1,): the set of row t is kept[cu_kept[t] : cu_kept[t + 1]]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number or [T]; no gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> TokenLogprobs:
    """Returns log-probs of `targets` under the softmax over the kept tokens of each row, [T] float32, in nats. The
    logits are softcap(logit_scale * (hidden @ weight.T + bias)) / temperature. A row with an empty set returns 0 in
    every output and has no gradient. `max_logprob` and `mean_logit` are None. Raises ValueError for wrong shapes,
    dtypes and devices, and on the CPU for a token outside the vocabulary and for a target that is not in the set of its
    row (on a GPU its log-prob is -inf).
    """
    row_temperature, temperature, scale, softcap = checked_transform(
        hidden, weight, targets, bias, temperature, logit_scale, softcap
    )
    check_tensor("kept", kept, tuple(kept.shape), hidden.device, (torch.int64,))
    check_cu_seqlens(cu_kept, len(kept), hidden.device)
    if len(cu_kept) != len(hidden) + 1:
        raise ValueError(f"cu_kept must have shape ({len(hidden) + 1},), got ({len(cu_kept)},)")
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and len(kept):
        for extreme in kept.aminmax():
            check_range("kept", int(extreme), 0, len(weight) - 1)
        _check_targets(targets, kept, cu_kept)
    heat = torch.full_like(targets, temperature, dtype=torch.float32) if row_temperature is None else row_temperature
    found = _forward(hidden, weight, bias, targets, kept, cu_kept, heat, scale, softcap)
    return TokenLogprobs(found[0], found[1], found[2] if entropy else None, None, None)


def linear_kept_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenLogprobs:
    """Computes the log-probs by their definition, from all logits at once with -inf outside the sets, in the dtype of
    the inputs."""
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    sizes = cu_kept.diff().long()
    member = torch.zeros_like(logits, dtype=torch.bool)
    member[torch.arange(len(hidden)).repeat_interleave(sizes), kept] = True
    logits = logits.masked_fill(~member, float("-inf")).where((sizes > 0)[:, None], 0.0)
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.where(member, 0.0)).sum(-1)
    rows = (logprobs.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1), entropy)
    logprob, logsumexp, entropy = (row.where(sizes > 0, 0.0) for row in rows)
    return TokenLogprobs(logprob, logsumexp, entropy, None, None)


def _check_targets(targets: Tensor, kept: Tensor, cu_kept: Tensor) -> None:
    """Raises ValueError unless every target is in the set of its row; rows with an empty set are not checked."""
    sizes = cu_kept.diff().long()
    row = torch.arange(len(targets)).repeat_interleave(sizes)
    found = torch.zeros(len(targets), dtype=torch.bool)
    found[row[kept == targets[row]]] = True
    missing = (~found & (sizes > 0)).nonzero()
    if len(missing):
        at = int(missing[0, 0])
        raise ValueError(f"kept must hold the target of every row; the set of row {at} lacks token {int(targets[at])}")


class _Chunk(NamedTuple):
    """Rows that are processed together, and their sets of tokens."""

    rows: Tensor
    """Indices of the rows, [n] int64."""
    union: Tensor
    """Union of their sets of tokens, [U] int64."""
    member: Tensor
    """Whether each token of the union is in the set of the row, [n, U] bool."""
    column: Tensor
    """Position of the target in `union`, [n, 1] int64."""


def _chunks(targets: Tensor, kept: Tensor, cu_kept: Tensor, vocab: int) -> Iterator[_Chunk]:
    """Yields chunks of rows; rows with an empty set are left out."""
    starts, sizes = cu_kept[:-1].long(), cu_kept.diff().long()
    limit = CPU_CHUNK if targets.device.type == "cpu" else GPU_CHUNK
    for rows in (sizes > 0).nonzero()[:, 0].split(max(limit // (4 * vocab), 1)):
        if not len(rows):
            return
        own = sizes[rows]
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(own)
        first = torch.nn.functional.pad(own.cumsum(0)[:-1], (1, 0))
        index = starts[rows][row] + torch.arange(len(row), device=rows.device) - first[row]
        union, place = kept[index].unique(return_inverse=True)
        member = torch.zeros(len(rows), len(union), dtype=torch.bool, device=rows.device)
        member[row, place] = True
        column = torch.searchsorted(union, targets[rows]).clamp(max=len(union) - 1)
        yield _Chunk(rows, union, member, column[:, None])


class _Values(NamedTuple):
    """The distributions over the kept tokens of the rows of a chunk, float32."""

    log_p: Tensor
    """Log-probs, [n, U]; -inf outside the set of the row."""
    logsumexp: Tensor
    """Logsumexp of the kept logits of each row, [n]."""
    entropy: Tensor
    """Entropy of each row, [n]."""
    slope: Tensor | float
    """Derivative of a logit with respect to its product hidden . weight, [n, U] or a number."""


def _values(
    chunk: _Chunk,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
) -> _Values:
    """Computes the distribution of each row of a chunk from hidden [n, D], weight [U, D] and bias [U]."""
    x = torch.nn.functional.linear(hidden, weight, bias) * scale
    cap = None if softcap is None else torch.tanh(x / softcap)
    slope = scale / temperature[:, None]
    z = (x if softcap is None or cap is None else softcap * cap) / temperature[:, None]
    z = z.masked_fill(~chunk.member, float("-inf"))
    peak = z.amax(1)
    z = z - peak[:, None]
    log_total = z.logsumexp(1)
    log_p = z - log_total[:, None]
    entropy = -(log_p.exp() * log_p.where(chunk.member, 0.0)).sum(1)
    return _Values(log_p, peak + log_total, entropy, slope if cap is None else slope * (1 - cap.square()))


def _gradient(chunk: _Chunk, values: _Values, g: Tensor, on_logsumexp: Tensor, on_entropy: Tensor) -> Tensor:
    """Returns the gradient with respect to hidden @ weight.T, [n, U], for upstream gradients [n]. The formula is that
    of `linear_logprob`."""
    log_p = values.log_p.where(chunk.member, 0.0)
    p = values.log_p.exp()
    level = (on_logsumexp - g)[:, None]
    dz = p * (level - on_entropy[:, None] * (log_p + values.entropy[:, None]))
    at_target = log_p.gather(1, chunk.column)[:, 0]
    own = -g * at_target.expm1() + at_target.exp() * (on_logsumexp - on_entropy * (at_target + values.entropy))
    return dz.scatter(1, chunk.column, own[:, None]) * values.slope


def _leaves(chunk: _Chunk, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gathers the rows of hidden, weight and bias that a chunk needs, as float32."""
    offset = None if bias is None else bias[chunk.union].float()
    return hidden[chunk.rows].float(), weight[chunk.union].float(), offset


# Custom operators are opaque to torch.compile, which could not trace unions whose size depends on the data.
@torch.library.custom_op("fastrlhf::linear_kept_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logprob, logsumexp, entropy), [T] float32 each."""
    outputs = [hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(3)]
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(targets, kept, cu_kept, len(weight)):
            values = _values(chunk, *_leaves(chunk, hidden, weight, bias), temperature[chunk.rows], scale, softcap)
            at_target = values.log_p.gather(1, chunk.column)[:, 0]
            for output, value in zip(outputs, (at_target, values.logsumexp, values.entropy), strict=True):
                output[chunk.rows] = value
    return outputs[0], outputs[1], outputs[2]


@_forward.register_fake
def _(hidden, *_):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))


def _save(ctx, inputs, output):
    hidden, weight, bias, targets, kept, cu_kept, temperature, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, kept, cu_kept, temperature)
    ctx.set_materialize_grads(True)


def _differentiate(ctx, *upstream):
    check_first_derivative("linear_kept_logprob")
    needs = ctx.needs_input_grad[:3]
    grads = _backward(*upstream, *ctx.saved_tensors, *ctx.options, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 6


torch.library.register_autograd("fastrlhf::linear_kept_logprob", _differentiate, setup_context=_save)


@torch.library.custom_op("fastrlhf::linear_kept_logprob_backward", mutates_args=())
def _backward(
    grad_logprob: Tensor,
    grad_logsumexp: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of hidden, weight and bias in their dtypes; a gradient that is not needed is empty."""
    leaves = (hidden, weight, bias)
    needs = (need_hidden, need_weight, need_bias)
    totals = [
        torch.zeros_like(leaf, dtype=torch.float32, memory_format=torch.contiguous_format)
        if leaf is not None and need
        else hidden.new_empty(0)
        for leaf, need in zip(leaves, needs, strict=True)
    ]
    on_hidden, on_weight, on_bias = totals
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(targets, kept, cu_kept, len(weight)):
            own, head, offset = _leaves(chunk, hidden, weight, bias)
            values = _values(chunk, own, head, offset, temperature[chunk.rows], scale, softcap)
            upstream = (grad[chunk.rows] for grad in (grad_logprob, grad_logsumexp, grad_entropy))
            dx = _gradient(chunk, values, *upstream)
            if need_hidden:
                on_hidden[chunk.rows] = dx @ head
            if need_weight:
                on_weight.index_add_(0, chunk.union, dx.T @ own)
            if need_bias and bias is not None:
                on_bias.index_add_(0, chunk.union, dx.sum(0))
    found = [total if leaf is None else total.to(leaf.dtype) for total, leaf in zip(totals, leaves, strict=True)]
    return found[0], found[1], found[2]


@_backward.register_fake
def _(*args):
    return gradients_like(args[3:6], args[-3:], args[0])
