"""Computes PPO's loss from hidden states in one op; value and gradient are those of `policy_loss(linear_logprob(...))`.

The forward computes the gradients too, with three matrix products instead of the four of the two-step form, and two
instead of three if the head is frozen; `_one_shot.py` says how. On a CPU rows without a gradient (outside the mask,
clipped, advantage 0) are left out of the last two products. On a GPU they cost both products, because counting them
would make the host wait; the two-step form waits and skips them, and is taken if `live_share` is below 2/3 (on a CPU
below 1/4).

Losses of whole sequences (`pair_loss`, gspo) need every token of a sequence first and use the two-step form.

Legend: T rows, V vocabulary, D hidden size. See `linear_logprob` for the gradient, `policy_loss` for the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import Selection
from fastrlhf_kernels._form import find_needs, takes_one_shot
from fastrlhf_kernels._one_shot import Head, fake_gradients, one_shot, save_gradients, scaled_gradients
from fastrlhf_kernels._triton import use_triton
from fastrlhf_kernels.linear_logprob import checked_transform, linear_logprob, linear_logprob_reference
from fastrlhf_kernels.policy_loss import (
    SUMS,
    _policy_loss,
    checked_policy_options,
    policy_loss,
    policy_loss_reference,
    policy_metrics,
)
from fastrlhf_kernels.types import LossOutput


def linear_policy_loss(
    hidden: Tensor,  # [T, D]; hidden, weight and bias have gradients
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    sampler_logprob: Tensor,  # [T] log-probs under the sampling policy, at this temperature
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
    live_share: float = 1.0,
    form: str = "auto",
    impl: str = "auto",
) -> LossOutput:
    """Returns loss and metrics of `policy_loss` for the log-probs of `targets`. `form` is "one_shot", "two_steps"
    (`linear_logprob`, then `policy_loss`) or "auto", the faster one for this shape and device and for the share of rows
    that the caller expects to have a gradient, `live_share`. Raises ValueError for bad arguments.
    """
    transform = checked_transform(hidden, weight, targets, bias, temperature, logit_scale, softcap)
    count, scalars = checked_policy_options(
        (len(hidden),), hidden.device, sampler_logprob, advantage, mask, num_tokens, clip_low, clip_high, dual_clip,
        reference_logprob, kl_coef, kl_kind, token_weight, entropy_coef, loss_type,
    )  # fmt: skip
    if loss_type == "gspo":
        raise ValueError("loss_type: gspo needs every token of a sequence first; call linear_logprob, then policy_loss")
    leaves, entropy = (hidden, weight, bias), entropy or entropy_coef != 0
    needs = find_needs(*leaves)
    triton = use_triton(impl, hidden.device)
    if not takes_one_shot(form, len(hidden), weight, needs, triton, live_share):
        head: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap, "ignore_index": ignore_index}
        out = linear_logprob(
            hidden, weight, targets.where(mask, ignore_index), bias=bias, temperature=temperature, **head,
            entropy=entropy, impl=impl,
        )  # fmt: skip
        return policy_loss(
            out.logprob, sampler_logprob, advantage, mask, num_tokens=num_tokens, loss_type=loss_type,
            clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, reference_logprob=reference_logprob,
            kl_coef=kl_coef, kl_kind=kl_kind, weight=token_weight, entropy=out.entropy, entropy_coef=entropy_coef,
            impl=impl,
        )  # fmt: skip
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
        triton,
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
    fixed = (sampler_logprob, advantage, live, reference_logprob, token_weight)
    live_fixed = [None if row is None else chosen.take(row) for row in fixed]
    scalars = (low, high, dual_clip, kl_coef, kl_kind, entropy_coef, loss_type, triton)

    def derivatives(block: slice, logprob: Tensor, bonus: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = [None if row is None else row[block] for row in live_fixed]
        *_, on_logprob, on_entropy = _policy_loss(logprob, *rows, bonus if entropy_coef else None, None, *scalars)
        return on_logprob / num_tokens, on_entropy / num_tokens if entropy_coef else None

    logprob, row_entropy, gradients = one_shot(
        Head(hidden, weight, bias, row_temperature, temperature, scale, softcap),
        targets,
        chosen,
        derivatives,
        ignore=ignore,
        entropy=entropy,
        needs=(need_hidden, need_weight, need_bias),
        triton=triton,
    )
    loss, sums, ratio_max, _, _ = _policy_loss(
        logprob, sampler_logprob, advantage, mask, reference_logprob, token_weight, row_entropy, None, *scalars
    )
    return loss / num_tokens, sums, ratio_max, gradients[0], gradients[1], gradients[2]


@_one_shot.register_fake
def _(hidden, weight, bias, *rest):
    scalar = hidden.new_empty((), dtype=torch.float32)
    gradients = fake_gradients(hidden, weight, bias, rest[-4:-1])
    return scalar, hidden.new_empty(len(SUMS), dtype=torch.float32), scalar.clone(), *gradients


torch.library.register_autograd(
    "fastrlhf::linear_policy_loss", scaled_gradients("linear_policy_loss"), setup_context=save_gradients
)
