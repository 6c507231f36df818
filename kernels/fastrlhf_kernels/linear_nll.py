"""Computes the negative log-likelihood of targets from hidden states in one op: the loss of supervised fine-tuning.

    loss = -sum of token_weight * logprob / num_tokens,   logprob as in `linear_logprob`

**Gradient**: that of `linear_logprob` for an upstream gradient g = -token_weight / num_tokens of each log-prob. Since g
is known in advance, the forward computes the gradients too, with three matrix products instead of four, or two instead
of three if the head is frozen (see `_one_shot.py`).

**Bytes**: a chunk of logits; on a CPU at most 512 rows and a quarter of the rows, on a GPU 4,096 rows. A trained head
takes a float32 accumulator of its size too, unless a single chunk holds all rows.

Legend: T rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import Selection
from fastrlhf_kernels._checks import check_tensor, divisor
from fastrlhf_kernels._form import find_needs, takes_one_shot
from fastrlhf_kernels._one_shot import Head, fake_gradients, one_shot, save_gradients, scaled_gradients
from fastrlhf_kernels._triton import use_triton
from fastrlhf_kernels.linear_logprob import checked_transform, linear_logprob, linear_logprob_reference
from fastrlhf_kernels.types import LossOutput, Sum


def linear_nll(
    hidden: Tensor,  # [T, D]; hidden, weight and bias have gradients
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    *,
    num_tokens: float | Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # [T]
    form: str = "auto",
    impl: str = "auto",
) -> LossOutput:
    """Returns the sum of the negative log-probs of `targets`, divided by `num_tokens`, with the metrics `nll` (the sum
    without weights, in nats) and `tokens` (the number of rows that are not ignored).

    `form` is "one_shot", "two_steps" (`linear_logprob`, then the sum) or "auto", the faster one for this shape and
    device. Raises ValueError for bad arguments.
    """
    transform = checked_transform(hidden, weight, targets, bias, temperature, logit_scale, softcap)
    count, triton = divisor("num_tokens", num_tokens), use_triton(impl, hidden.device)
    if token_weight is not None:
        check_tensor("token_weight", token_weight, (len(hidden),), hidden.device)
        token_weight = token_weight.detach().float().where(targets != ignore_index, 0)
    tokens = Sum((targets != ignore_index).sum(dtype=torch.float32))
    leaves = (hidden, weight, bias)
    needs = find_needs(*leaves)
    if not takes_one_shot(form, len(hidden), weight, needs, triton):
        options: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap, "ignore_index": ignore_index}
        out = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, **options, impl=impl)
        nll = -out.logprob.sum()
        loss = nll if token_weight is None else -(out.logprob * token_weight).sum()
        return LossOutput(loss / count, {"nll": Sum(nll.detach()), "tokens": tokens})
    divided_by = torch.ones((), dtype=torch.float32, device=hidden.device) * count
    loss, nll, *_ = _one_shot(*leaves, targets, token_weight, divided_by, *transform, ignore_index, *needs, triton)
    return LossOutput(loss, {"nll": Sum(nll), "tokens": tokens})


def linear_nll_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_tokens: float,
    token_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Computes the loss by its definition, in the dtype of the inputs."""
    logprob = linear_logprob_reference(hidden, weight, targets, **options).logprob
    return -(logprob if token_weight is None else token_weight * logprob).sum() / num_tokens


@torch.library.custom_op("fastrlhf::linear_nll", mutates_args=())
def _one_shot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    num_tokens: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    ignore: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss [], sum of the negative log-probs [], gradients of hidden, weight and bias).

    A gradient that is not needed has shape [0].
    """
    live = targets != ignore
    chosen = Selection.of(live, wait=False)
    weights = live.float() if token_weight is None else token_weight  # 0 in ignored rows
    on_logprob = chosen.take(-weights / num_tokens)
    logprob, _, gradients = one_shot(
        Head(hidden, weight, bias, row_temperature, temperature, scale, softcap),
        targets,
        chosen,
        lambda block, *_: (on_logprob[block], None),
        ignore=ignore,
        entropy=False,
        needs=(need_hidden, need_weight, need_bias),
        triton=triton,
    )
    nll = -logprob.sum()
    loss = nll.clone() if token_weight is None else -(weights * logprob).sum()
    return loss / num_tokens, nll, gradients[0], gradients[1], gradients[2]


@_one_shot.register_fake
def _(hidden, weight, bias, *rest):
    scalar = hidden.new_empty((), dtype=torch.float32)
    return scalar, scalar.clone(), *fake_gradients(hidden, weight, bias, rest[-4:-1])


torch.library.register_autograd("fastrlhf::linear_nll", scaled_gradients("linear_nll"), setup_context=save_gradients)
