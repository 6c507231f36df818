"""Computes PPO's loss from hidden states in one op; value and gradient are those of `policy_loss(linear_logprob(...))`.

The gradient with respect to a log-prob is known as soon as the logits of its row are known, so the forward computes the
gradients too. It needs three matrix products instead of the four of the two-step form, and two instead of three if the
head is frozen. (On a GPU rows outside the mask still cost the last two products; the two-step form skips these rows.)
The op works on chunks of rows and stores the logits of one chunk. On a GPU they are stored as exp(z - peak) in
bfloat16, whose relative error of 2^-9 is that of a bfloat16 gradient (bfloat16 logits would be off by up to 0.06 nats).

    chunk of rows: products -> masses, logprob, entropy -> slopes of the loss -> gradient of the logits, in place
                   -> dhidden of these rows, dweight += ...

If the head is trained, this costs a float32 accumulator of the head's size, to which each chunk adds. The forward keeps
the gradients; the backward multiplies them by the upstream gradient into new memory. Losses of whole sequences
(`pair_loss`, gspo) need every token of a sequence first and use the two-step form.

Legend: T rows, V vocabulary, D hidden size. See `linear_logprob` for the gradient, `policy_loss` for the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels import _head
from fastrlhf_kernels._blocks import Logits, Selection, add_product, fold, gradient, gradients_like, slopes
from fastrlhf_kernels._checks import check_first_derivative
from fastrlhf_kernels._tiles import STORING, cdiv, choose_tiles, row_major
from fastrlhf_kernels._triton import use_triton
from fastrlhf_kernels.linear_logprob import check_rows_that_count, checked_transform, linear_logprob_reference
from fastrlhf_kernels.policy_loss import (
    SUMS,
    _policy_loss,
    checked_policy_options,
    policy_loss_reference,
    policy_metrics,
)
from fastrlhf_kernels.types import LossOutput

CPU_CHUNK, GPU_CHUNK = 1 << 25, 1 << 28  # target size of a chunk's logits in bytes
CAST_ROWS = 8192


def linear_policy_loss(
    hidden: Tensor,  # [T, D]; hidden, weight and bias have gradients
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    sampler_logprob: Tensor,  # [T] under the policy that sampled the tokens, at the same temperature
    advantage: Tensor,  # [T]
    mask: Tensor,  # [T] bool, True where the token is trained
    *,
    num_tokens: float | Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    loss_type: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    reference_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    token_weight: Tensor | None = None,  # the `weight` of policy_loss
    entropy: bool = False,  # whether to report the entropy; with a non-zero entropy_coef it is always computed
    entropy_coef: float = 0.0,
    impl: str = "auto",
) -> LossOutput:
    """Loss and metrics of `policy_loss` for the log-probs of `targets`. Raises ValueError for bad arguments."""
    transform = checked_transform(hidden, weight, targets, bias, temperature, logit_scale, softcap)
    count, scalars = checked_policy_options(
        (len(hidden),), hidden.device, sampler_logprob, advantage, mask, num_tokens, clip_low, clip_high, dual_clip,
        reference_logprob, kl_coef, kl_kind, token_weight, entropy_coef, loss_type,
    )  # fmt: skip
    if loss_type == "gspo":
        raise ValueError("loss_type: gspo needs every token of a sequence first; call linear_logprob, then policy_loss")
    leaves, entropy = (hidden, weight, bias), entropy or entropy_coef != 0
    needs = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    fixed = (sampler_logprob, advantage, mask, reference_logprob, token_weight)
    loss, sums, ratio_max, *_ = _one_shot(
        *leaves,
        targets,
        *(None if row is None else row.detach() for row in fixed),
        torch.ones((), dtype=torch.float32, device=hidden.device)
        * count,  # torch.compile would make torch.full a constant
        *transform,
        ignore_index,
        entropy,
        *scalars,
        *needs,
        use_triton(impl, hidden.device),
    )
    return LossOutput(loss, policy_metrics(sums, ratio_max, reference_logprob is not None, entropy))


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Computes log-probs and then the loss by their definitions, in the dtype of the inputs."""
    logprob = linear_logprob_reference(hidden, weight, targets, softcap=softcap).logprob
    return policy_loss_reference(logprob, sampler_logprob, advantage, mask, **options)


@torch.library.custom_op("fastrlhf::linear_policy_loss", mutates_args=())
def _one_shot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_logprob: Tensor | None,
    token_weight: Tensor | None,
    num_tokens: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    ignore: int,
    entropy: bool,
    low: float,
    high: float,
    dual_clip: float,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    loss_type: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss [], sums of the metrics, largest ratio [], gradients of hidden, weight and bias).

    A gradient that is not needed has shape [0].
    """
    targets = targets.where(mask, ignore)  # so that tiles without a trained row are skipped
    live = targets != ignore
    chosen = Selection.of(live, wait=False)
    check_rows_that_count(chosen, targets, len(weight), row_temperature)
    live_hidden, live_targets = chosen.take(hidden), chosen.take(targets)
    live_temperature = None if row_temperature is None else chosen.take(row_temperature, 1)
    fixed = (sampler_logprob, advantage, live, reference_logprob, token_weight)
    live_fixed = [None if row is None else chosen.take(row) for row in fixed]
    scalars = (low, high, dual_clip, kl_coef, kl_kind, entropy_coef, loss_type, triton)
    factor = scale / (temperature if live_temperature is None else live_temperature)
    chunks = (_TritonChunks if triton else _TorchChunks)(
        live_hidden,
        weight,
        bias,
        live_temperature,
        temperature,
        scale,
        softcap,
        chosen.dead,
        (need_hidden, need_weight, need_bias),
    )
    logprob, row_entropy = (hidden.new_zeros(len(live_hidden), dtype=torch.float32) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        for start in range(0, len(live_hidden), chunks.step):
            block = slice(start, min(start + chunks.step, len(live_hidden)))
            logprob[block], row_entropy[block], peak, total = chunks.fold(block, live_targets[block], ignore, entropy)
            rows = [_rows_of(row, block) for row in live_fixed]
            bonus = row_entropy[block] if entropy_coef else None
            *_, d_logprob, d_entropy = _policy_loss(logprob[block], *rows, bonus, None, *scalars)
            d_logprob, d_entropy = d_logprob / num_tokens, d_entropy / num_tokens if entropy_coef else None
            row_factor = factor[block] if isinstance(factor, Tensor) else factor
            gradients = slopes(d_logprob, 0.0, d_entropy, row_factor, logprob[block], bonus, total)
            chunks.add_gradient(block, live_targets[block], peak, *gradients)
    full = (
        chosen.put_back(logprob),
        *fixed[:2],
        mask,
        *fixed[3:],
        chosen.put_back(row_entropy) if entropy else None,
        None,
    )
    loss, sums, ratio_max, _, _ = _policy_loss(*full, *scalars)
    grad_hidden = chunks.grad_hidden  # already 0 in processed rows that are not live
    if grad_hidden is not None and chosen.rows is not None:
        grad_hidden = chosen.put_back(grad_hidden)
    grads = [
        hidden.new_empty(0) if leaf is None or grad is None else grad.to(_kept_dtype(leaf))
        for leaf, grad in ((hidden, grad_hidden), (weight, chunks.grad_weight), (bias, chunks.grad_bias))
    ]
    return loss / num_tokens, sums, ratio_max, grads[0], grads[1], grads[2]


@_one_shot.register_fake
def _(hidden, weight, bias, *rest):
    kept = (hidden.to(_kept_dtype(hidden)), weight.to(_kept_dtype(weight)))
    grads = gradients_like((*kept, None if bias is None else bias.to(_kept_dtype(bias))), rest[-4:-1], hidden)
    scalar = hidden.new_empty((), dtype=torch.float32)
    return scalar, hidden.new_empty(len(SUMS), dtype=torch.float32), scalar.clone(), *grads


def _kept_dtype(leaf: Tensor) -> torch.dtype:
    """Returns the dtype in which the forward keeps the gradient of a tensor: its own dtype, or float32 for float16.

    The forward does not know the upstream gradient, which may contain a loss scale. Without the loss scale, float16
    would underflow.
    """
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in inputs[:3]]
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    check_first_derivative("linear_policy_loss")
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    for leaf, saved in enumerate(ctx.saved_tensors):
        if ctx.needs_input_grad[leaf]:
            gradients[leaf] = _scaled(saved, grad, ctx.dtypes[leaf])
    return tuple(gradients)


@torch.library.custom_op("fastrlhf::scaled", mutates_args=())
def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes tensor * factor in float32 and rounds once to `dtype`, without a float32 copy of the whole tensor."""
    out = torch.empty_like(tensor, dtype=dtype)
    for some, part in zip(tensor.split(8192), out.split(8192), strict=True):
        part.copy_(some.float() * factor)
    return out


@_scaled.register_fake
def _(tensor, factor, dtype):
    return torch.empty_like(tensor, dtype=dtype)


torch.library.register_autograd("fastrlhf::linear_policy_loss", _differentiate, setup_context=_save)


class _TorchChunks:
    """Processes rows in chunks in torch; holds the logits of the current chunk and the gradients summed so far."""

    def __init__(self, hidden, weight, bias, row_temperature, temperature, scale, softcap, dead, needs):
        hidden = hidden if dead is None else hidden.masked_fill(dead, 0)
        self.logits = Logits.of(hidden, weight, bias, row_temperature, temperature, scale, softcap)
        need_hidden, need_weight, need_bias = needs
        self.grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if need_hidden else None
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        self.grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        self.step = chunk_rows(len(weight) * 4, CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK)
        self.z = hidden.new_empty(min(self.step, len(hidden)), len(weight), dtype=torch.float32)

    def fold(self, block: slice, targets: Tensor, ignore: int, entropy: bool) -> tuple[Tensor, ...]:
        """Computes the logits of a chunk, keeps them in `z`, and returns (logprob, entropy or 0, peak, total), [rows]
        each."""
        state = ()
        for part in self.logits.parts():
            z = self.logits.block(block, part)
            self.z[: len(z), part.start : part.start + z.shape[1]] = z
            state = fold(state, z, targets - part.start, entropy, False)
        peak, total, target, gap, _ = state  # pyright: ignore[reportAssignmentType]
        log_total = total.log()
        return target - peak - log_total, log_total + gap / total if entropy else torch.zeros_like(peak), peak, total

    def add_gradient(self, block: slice, targets: Tensor, peak: Tensor, *rows: Tensor | None) -> None:
        """Adds the gradients of a chunk; `rows` are the coefficients (level, tilt, at_target) that `slopes` returns."""
        hidden = self.logits.hidden[block]
        for part in self.logits.parts():
            columns = slice(part.start, part.start + len(part.weight))
            z = self.z[: len(hidden), columns]
            slope = None if self.logits.softcap is None else self.logits.slope(block, z)
            dx = gradient(z, targets - part.start, peak, *rows)  # pyright: ignore[reportArgumentType]
            if slope is not None:
                dx *= slope
            if self.grad_bias is not None:
                self.grad_bias[columns] += dx.sum(0)
            dx = dx.to(hidden.dtype)
            if self.grad_hidden is not None:
                add_product(self.grad_hidden[block], dx, part.weight)
            if self.grad_weight is not None:
                add_product(self.grad_weight[columns], dx.T, hidden)


class _TritonChunks:
    """Processes rows in chunks like `_TorchChunks`, with the Triton kernels of `_head_kernels.py`.

    The logits of a chunk are kept as masses exp(z - top).
    """

    def __init__(self, hidden, weight, bias, row_temperature, temperature, scale, softcap, dead, needs):
        self.head, self.dead = (row_major(hidden), row_major(weight), bias), dead
        self.row_temperature, self.transform = row_temperature, (temperature, scale, softcap)
        need_hidden, need_weight, need_bias = needs
        native = hidden.dtype == weight.dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if native else torch.float32
        self.grad_hidden = hidden.new_zeros(hidden.shape, dtype=self.dtype) if need_hidden else None
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        self.grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        vocab = cdiv(len(weight), 16) * 16  # cuBLAS and TMA need rows that start at multiples of 16 bytes
        self.step = chunk_rows(vocab * self.dtype.itemsize, GPU_CHUNK)
        self.tiles = choose_tiles(STORING, *self.head[:2], _head.is_heavy(bias, row_temperature, softcap))
        rows = min(self.step, len(hidden))
        self.masses = hidden.new_empty(rows, vocab, dtype=self.dtype)[:, : len(weight)]
        self.tops = hidden.new_empty(cdiv(len(weight), self.tiles.vocab) * rows, dtype=torch.float32)

    def fold(self, block: slice, targets: Tensor, ignore: int, entropy: bool) -> tuple[Tensor, ...]:
        hidden, weight, bias = self.head
        hidden, temperature = hidden[block], _rows_of(self.row_temperature, block)
        stored = (self.tiles, self.masses[: len(hidden)], self.tops)
        options = (*self.transform, ignore, entropy, False)
        logprob, _, row_entropy, _, _, peak, total = _head.forward(
            hidden, weight, bias, targets, temperature, *options, *stored
        )
        self.logit = logprob + peak + total.log()  # logits of the targets
        return logprob, row_entropy if entropy else torch.zeros_like(logprob), peak, total

    def add_gradient(
        self, block: slice, targets: Tensor, peak: Tensor, level: Tensor, tilt: Tensor | None, at_target: Tensor
    ) -> None:
        hidden, weight, _ = self.head
        hidden, row_temperature = hidden[block], _rows_of(self.row_temperature, block)
        temperature, _, softcap = self.transform
        if softcap is not None:
            z = self.logit * (temperature if row_temperature is None else row_temperature)
            at_target = at_target * (1 - (z / softcap).square())
        dx = self.masses[: len(hidden)]
        rows = (peak, level, tilt, at_target)
        _head.scale_masses(dx, self.tops, targets, row_temperature, *self.transform, self.tiles, *rows)
        if self.grad_bias is not None:
            self.grad_bias += dx.sum(0, dtype=torch.float32)
        if self.grad_hidden is not None and self.dtype == torch.bfloat16:
            torch.mm(dx, weight, out=self.grad_hidden[block])
        elif self.grad_hidden is not None:
            for start in range(0, len(weight), CAST_ROWS):  # casts a few rows of the weight at a time
                part = slice(start, start + CAST_ROWS)
                add_product(self.grad_hidden[block], dx[:, part], weight[part].float())
        if self.grad_weight is not None:
            hidden = hidden if self.dead is None else hidden.masked_fill(self.dead[block], 0)
            add_product(self.grad_weight, dx.T, hidden.to(self.dtype))


def chunk_rows(row_bytes: int, limit: int) -> int:
    """Number of rows whose logits take about `limit` bytes: a multiple of 128, or of 16 if 128 rows are too many."""
    rows = limit // row_bytes
    return max(rows // 128 * 128 or rows // 16 * 16, 16)


def _rows_of(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[block]
