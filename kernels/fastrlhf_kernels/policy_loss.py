"""Policy-gradient losses of PPO and of the GRPO family, with optional KL and entropy terms per token.

    r_t    = exp(clamp(logprob - sampler_logprob, +-20))
    ppo      g_t = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    gspo     as ppo, with s_t = exp(mean of logprob - sampler_logprob over the sequence's trained tokens) for r_t
    cispo    g_t = stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A logprob;  clip_low 1 means no lower bound
    l_t    = -g_t + kl_coef w k - entropy_coef H
    loss   = sum_t mask weight l_t / num_tokens

GRPO, DAPO, Dr. GRPO and BNPO use ppo's g_t with other averages, which `weight` and `num_tokens` express. With
dual_clip c, -g_t is at most -c A for A < 0. k is k2 or k3 of `kl_estimate`, with its weight w.

The gradient of -g_t with respect to logprob, for ppo and gspo, is -r A (gspo: -s A) if the token is active, else 0. A
token is active if

    |logprob - sampler_logprob| <= 20  and  (A >= 0: r <= 1 + clip_high,   A < 0: r >= 1 - clip_low and r <= c)

With r = 1 everywhere this is the gradient of REINFORCE. For gspo it is the gradient of GSPO-token (eq. 14): each token
moves only its own log-prob. If advantage and weight are constant over a sequence, the sum over its tokens is GSPO's
gradient. For cispo the gradient is -clip(r) A, for every token. The KL term adds kl_coef w delta; the gradient with
respect to H is -entropy_coef.

Rows with mask False affect neither the loss nor a gradient, even if they hold NaN or infinity.

On a GPU one kernel reads the inputs once and writes the gradients: 17 T bytes in float32, 4 T more for each further
tensor and for the gradient of the entropy. gspo first computes its sequence means, in a few passes over [T]. The
backward moves 8 T for each gradient.

Legend: T tokens, A advantage, H entropy. PPO: Schulman et al. 2017 (arXiv 1707.06347) eq. 7; dual clip: Ye et al. 2020
(arXiv 1912.09729); asymmetric clip: DAPO, Yu et al. 2025 (arXiv 2503.14476) eq. 8; GSPO: Zheng et al. 2025 (arXiv
2507.18071) eq. 5 and 14; CISPO: MiniMax-M1, 2025 (arXiv 2506.13585) eq. 4.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf_kernels import _rows
from fastrlhf_kernels._checks import check_choice, check_cu_seqlens, check_range, check_rows, check_tensor, divisor
from fastrlhf_kernels._policy_kernels import policy_kernel, torch_policy_terms
from fastrlhf_kernels._rows import contiguous, differentiate_by_slopes, masked
from fastrlhf_kernels._segments import segment_of_row, segment_sum
from fastrlhf_kernels._triton import OPTIONS, use_triton
from fastrlhf_kernels.types import LossOutput, Max, Metric, Sum

LOSS_TYPES = ("ppo", "gspo", "cispo")
SUMS = ("policy_loss", "ratio", "clip_fraction", "dual_clip_fraction", "approx_kl", "tokens", "kl", "entropy")


def policy_loss(
    logprob: Tensor,  # [T] nats; logprob and entropy have gradients
    sampler_logprob: Tensor,  # [T] log-probs under the sampling policy, at this temperature
    advantage: Tensor,  # [T]
    mask: Tensor,  # [T] bool, True where the token is trained
    *,
    num_tokens: float | Tensor,  # trained tokens of the whole optimiser step, over all micro-batches and ranks
    loss_type: str = "ppo",
    cu_seqlens: Tensor | None = None,  # [N+1] int32, only for gspo: delimits the sequences in the T rows
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    reference_logprob: Tensor | None = None,  # [T]
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    weight: Tensor | None = None,  # [T] multiplies every term of l_t; no gradient
    entropy: Tensor | None = None,  # [T] nats
    entropy_coef: float = 0.0,
    impl: str = "auto",
) -> LossOutput:
    """Returns the policy loss sum_t mask weight (-g_t + kl_coef w k - entropy_coef H) / num_tokens, float32.

    `loss_type` chooses g_t. Raises ValueError for bad arguments. Metrics, summed over the trained tokens:

        policy_loss         first term of the loss, weighted
        ratio               r (gspo: the ratio of the sequence); ratio_max is the maximum of r, not a sum
        clip_fraction       1 if a bound of the clip or of the dual clip replaces r; ppo and gspo: no gradient then
        dual_clip_fraction  1 if the bound of the dual clip replaces r
        approx_kl           k3 estimate of KL(sampler || policy)
        tokens              1
        kl, entropy         w k and H, if their inputs are given
    """
    check_rows("logprob", logprob)
    shape, device = tuple(logprob.shape), logprob.device
    count, scalars = checked_policy_options(
        shape, device, sampler_logprob, advantage, mask, num_tokens, clip_low, clip_high, dual_clip,
        reference_logprob, kl_coef, kl_kind, weight, entropy_coef, loss_type,
    )  # fmt: skip
    if (loss_type == "gspo") != (cu_seqlens is not None):
        raise ValueError(f"cu_seqlens: pass it with loss_type gspo, and only then; loss_type is {loss_type!r}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(logprob), device)
    if entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs entropy: ask linear_logprob for it with entropy=True")
    if entropy is not None:
        check_tensor("entropy", entropy, shape, device)

    loss, sums, ratio_max, _, _ = _policy_loss(
        logprob,
        sampler_logprob.detach(),
        advantage.detach(),
        mask,
        None if reference_logprob is None else reference_logprob.detach(),
        None if weight is None else weight.detach(),
        entropy if entropy is None or entropy_coef else entropy.detach(),  # avoids a backward of zeros
        None if cu_seqlens is None else _sequence_log_ratio(logprob, sampler_logprob, mask, cu_seqlens),
        *scalars,
        use_triton(impl, device),
    )
    return LossOutput(loss / count, policy_metrics(sums, ratio_max, reference_logprob is not None, entropy is not None))


def checked_policy_options(
    shape: tuple[int, ...],
    device: torch.device,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    num_tokens: float | Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    reference_logprob: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    weight: Tensor | None,
    entropy_coef: float,
    loss_type: str,
) -> tuple[float | Tensor, tuple[float, float, float, float, str, float, str]]:
    """Checks the arguments; returns (the divisor of the sum, the scalar arguments of `_policy_loss`).

    Raises ValueError for bad arguments.
    """
    check_tensor("mask", mask, shape, device, (torch.bool,))
    check_range("clip_low", clip_low, 0, 1)
    check_range("clip_high", clip_high, 0, float("inf"))
    check_choice("kl_kind", kl_kind, ("k2", "k3"))
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1, float("inf"), open_ends=True)
        if loss_type == "cispo":
            raise ValueError("dual_clip: must be None with loss_type cispo, which has no dual clip")
    if kl_coef and reference_logprob is None:
        raise ValueError("kl_coef needs reference_logprob")
    check_tensor("sampler_logprob", sampler_logprob, shape, device)
    check_tensor("advantage", advantage, shape, device)
    for name, tensor in (("reference_logprob", reference_logprob), ("weight", weight)):
        if tensor is not None:
            check_tensor(name, tensor, shape, device)
    bounds = (1 - clip_low, 1 + clip_high, float("inf") if dual_clip is None else float(dual_clip))
    return divisor("num_tokens", num_tokens), (*bounds, float(kl_coef), kl_kind, float(entropy_coef), loss_type)


def policy_loss_reference(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    num_tokens: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = float("inf"),
    loss_type: str = "ppo",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Computes the first term of the loss by its definition, in the dtype of the inputs.

    Log-ratios must be within +-20 and all values finite. gspo is the sequence form (eq. 5), whose gradient equals the
    op's if advantages are constant over a sequence.
    """
    log_ratio = logprob - sampler_logprob
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [(log_ratio[a:b], mask[a:b]) for a, b in itertools.pairwise(bounds)]
        log_ratio = torch.cat([x[kept].mean().expand_as(x) for x, kept in parts])
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        return -(ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantage * logprob)[mask].sum() / num_tokens
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return -gain[mask].sum() / num_tokens


@torch.library.custom_op("fastrlhf::policy_loss", mutates_args=())
def _policy_loss(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_logprob: Tensor | None,
    weight: Tensor | None,
    entropy: Tensor | None,
    sequence_log_ratio: Tensor | None,
    low: float,
    high: float,
    dual_clip: float,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    loss_type: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (sum of the loss [], metrics SUMS [8], largest ratio [], d loss / d logprob [T], d loss / d entropy [T]).

    d loss / d entropy is [0] without `entropy`.
    """
    scalars = (low, high, dual_clip, kl_coef, entropy_coef, kl_kind, loss_type)
    if not triton:
        scale = mask.float() if weight is None else masked(weight, mask)
        reference, bonus = (None if x is None else masked(x, mask) for x in (reference_logprob, entropy))
        logprob, sampler_logprob, advantage = (masked(x, mask) for x in (logprob, sampler_logprob, advantage))
        terms = torch_policy_terms(
            logprob, sampler_logprob, advantage, scale, reference, bonus, sequence_log_ratio, *scalars
        )
        none, ratio = scale.new_empty(0), terms.ratio.where(mask, 0)
        rows = (
            terms.surrogate,
            ratio,
            terms.clipped.float(),
            terms.dual_clipped.float(),
            terms.approx_kl,
            mask.float(),
            terms.kl,
        )
        sums = torch.stack([x.sum() for x in (*rows, none if bonus is None else bonus)])
        largest = F.pad(ratio, (0, 1)).amax()  # the padding makes T = 0 work
        return terms.loss.sum(), sums, largest, terms.d_logprob, none if bonus is None else terms.d_entropy
    num_rows, num_programs = len(logprob), _rows.num_programs(len(logprob))
    partials = logprob.new_empty(2 + len(SUMS), num_programs, dtype=torch.float32)
    d_logprob = logprob.new_empty(num_rows, dtype=torch.float32)
    d_entropy = logprob.new_empty(0 if entropy is None else num_rows, dtype=torch.float32)
    given = (logprob, sampler_logprob, advantage, mask, reference_logprob, weight, entropy, sequence_log_ratio)
    tensors = contiguous(*given)
    with torch.cuda.device_of(logprob):
        outputs = (partials, d_logprob, d_entropy)
        policy_kernel[(num_programs,)](*tensors, *outputs, num_rows, *scalars, _rows.BLOCK, **OPTIONS)
    return partials[0].sum(), partials[1:-1].sum(1), partials[-1].amax(), d_logprob, d_entropy


@_policy_loss.register_fake
def _(logprob, sampler_logprob, advantage, mask, reference_logprob, weight, entropy, *_):
    shapes = ((), len(SUMS), (), logprob.shape, 0 if entropy is None else entropy.shape)
    return tuple(logprob.new_empty(shape, dtype=torch.float32) for shape in shapes)


differentiate_by_slopes("fastrlhf::policy_loss", leaves=(0, 6))


@torch.no_grad()
def _sequence_log_ratio(logprob: Tensor, sampler_logprob: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns for each row the mean of logprob - sampler_logprob over the trained tokens of its sequence, [T]
    float32."""
    difference = masked(logprob, mask) - masked(sampler_logprob, mask)
    counts = segment_sum(mask.float(), cu_seqlens).clamp(min=1)
    return (segment_sum(difference, cu_seqlens) / counts)[segment_of_row(cu_seqlens, len(logprob))]


def policy_metrics(sums: Tensor, ratio_max: Tensor, kl: bool, entropy: bool) -> dict[str, Metric]:
    """Collects the metrics of `policy_loss` in a dict; `sums` [8] are in the order of SUMS."""
    metrics: dict[str, Metric] = {name: Sum(total) for name, total in zip(SUMS, sums.unbind(), strict=True)}
    metrics["ratio_max"] = Max(ratio_max)
    return {name: metrics[name] for name in metrics if (name != "kl" or kl) and (name != "entropy" or entropy)}
