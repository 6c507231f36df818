"""Per-token estimates of KL(policy || reference) from sampled tokens.

    delta = logprob - reference_logprob,   w = exp(logprob - sampler_logprob), or 1 without sampler_logprob
    k1 = delta        k2 = delta^2 / 2        k3 = exp(-delta) - 1 + delta        value = w k

The gradient with respect to logprob is w delta for k2 and k3. Its expectation over the sampler's tokens is the gradient
of the token-wise KL(policy || reference). (Differentiating k3 itself would give the gradient of KL(reference ||
policy).) k1 has no gradient here, because that gradient would be 0 in expectation: use k1 in the reward. No other
argument has a gradient.

Both log-ratios are clamped to +-20: the value cannot overflow, and the gradient stays at w 20 if the policies are far
apart. For |delta| < 1, k3 is computed by its series, because exp(-d) - 1 + d has no correct digit left at d = 1e-4.

On a GPU one kernel reads the inputs once and writes value and slope: 20 T bytes in float32. The backward moves 12 T.

Legend: T tokens. Schulman 2020, "Approximating KL divergence"; gradients: Liu et al. 2025 (arXiv 2510.01555), Tang and
Munos 2025 (arXiv 2506.09477).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels import _rows
from fastrlhf_kernels._checks import check_choice, check_rows, check_tensor
from fastrlhf_kernels._rows import contiguous, differentiate_by_slopes, load_float32
from fastrlhf_kernels._triton import OPTIONS, constant, jit, tl, use_triton

KINDS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0
LIMIT = constant(MAX_LOG_RATIO)
POWER = 11  # highest power of delta in the series of k3; the truncation error is below 1e-8 of k3
LAST = constant(POWER)


def kl_estimate(
    logprob: Tensor,  # [T] nats; the only argument with a gradient
    reference_logprob: Tensor,  # [T]
    *,
    kind: str = "k1",
    sampler_logprob: Tensor | None = None,  # [T] log-probs under the sampling policy; None: the current policy
    impl: str = "auto",
) -> Tensor:
    """Returns the KL estimate w k of each token, [T] float32, nats. The gradient is w delta for k2 and k3; k1 has no
    gradient.

    Raises ValueError for bad arguments.
    """
    check_choice("kind", kind, KINDS)
    check_rows("logprob", logprob)
    check_tensor("reference_logprob", reference_logprob, tuple(logprob.shape), logprob.device)
    if sampler_logprob is not None:
        check_tensor("sampler_logprob", sampler_logprob, tuple(logprob.shape), logprob.device)
        sampler_logprob = sampler_logprob.detach()
    triton = use_triton(impl, logprob.device)
    leaf = logprob.detach() if kind == "k1" else logprob
    return _kl_estimate(leaf, reference_logprob.detach(), sampler_logprob, kind, triton)[0]


def kl_estimate_reference(
    logprob: Tensor, reference_logprob: Tensor, *, kind: str, sampler_logprob: Tensor | None = None
) -> Tensor:
    """Computes the estimate by its definition, in the dtype of the inputs, without clamps; autograd finds w delta.

    w delta is the gradient of w k3 if w is differentiated too, and of w k2 if w is held constant.
    """
    weight = torch.exp(logprob - (logprob.detach() if sampler_logprob is None else sampler_logprob.detach()))
    delta = logprob - reference_logprob.detach()
    if kind == "k1":
        return (weight * delta).detach()
    return weight.detach() * delta**2 / 2 if kind == "k2" else weight * (torch.exp(-delta) - 1 + delta)


@torch.library.custom_op("fastrlhf::kl_estimate", mutates_args=())
def _kl_estimate(
    logprob: Tensor, reference_logprob: Tensor, sampler_logprob: Tensor | None, kind: str, triton: bool
) -> tuple[Tensor, Tensor]:
    """The operator behind `kl_estimate`; returns (value w k, slope w delta), [T] float32 each."""
    if not triton:
        logprob, weight = logprob.float(), torch.ones_like(logprob, dtype=torch.float32)
        if sampler_logprob is not None:
            weight = torch_clamped(logprob - sampler_logprob.float()).exp()
        return torch_kl_terms(logprob, reference_logprob.float(), weight, kind)
    num_rows = len(logprob)
    value, slope = (logprob.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    tensors = contiguous(logprob, reference_logprob, sampler_logprob)
    with torch.cuda.device_of(logprob):
        kl_kernel[(_rows.num_programs(num_rows),)](*tensors, value, slope, num_rows, kind, _rows.BLOCK, **OPTIONS)
    return value, slope


@_kl_estimate.register_fake
def _(logprob, reference_logprob, sampler_logprob, kind, triton):
    return tuple(logprob.new_empty(logprob.shape, dtype=torch.float32) for _ in range(2))


differentiate_by_slopes("fastrlhf::kl_estimate", leaves=(0,))


def torch_kl_terms(logprob: Tensor, reference_logprob: Tensor, weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns (value w k, slope w delta) per row; `kl_terms` is the Triton version."""
    delta = torch_clamped(logprob - reference_logprob)
    return weight * torch_estimator(delta, kind), weight * delta


def torch_estimator(delta: Tensor, kind: str) -> Tensor:
    """Evaluates the estimator k1, k2 or k3 at log-ratios delta."""
    if kind == "k1":
        return delta
    half_square = delta.square() / 2
    if kind == "k2":
        return half_square
    series = torch.ones_like(delta)
    for n in range(POWER, 2, -1):
        series = 1 - delta * series / n
    return torch.where(delta.abs() < 1, half_square * series, torch.exp(-delta) - 1 + delta)


def torch_clamped(log_ratio: Tensor) -> Tensor:
    """Clamps log-ratios to +-MAX_LOG_RATIO; NaN stays NaN."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@jit
def kl_terms(logprob, reference_logprob, weight, KIND: tl.constexpr):
    """Returns (value w k, slope w delta) of float32 rows with weight w."""
    delta = clamped(logprob - reference_logprob)
    return weight * estimator(delta, KIND), weight * delta


@jit
def estimator(delta, KIND: tl.constexpr):
    """Evaluates the estimator k1, k2 or k3 at log-ratios delta."""
    value = delta
    if KIND != "k1":
        value = delta * delta * 0.5
    if KIND == "k3":
        series = tl.full(delta.shape, 1.0, tl.float32)
        for n in tl.static_range(LAST, 2, -1):  # pyright: ignore[reportGeneralTypeIssues]
            series = 1 - delta * series * (1.0 / n)
        value = tl.where(tl.abs(delta) < 1, value * series, tl.exp(-delta) - 1 + delta)
    return value


@jit
def clamped(log_ratio):
    """Clamps log-ratios to +-LIMIT; NaN stays NaN."""
    return tl.clamp(log_ratio, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@jit
def kl_kernel(
    logprob,
    reference_logprob,
    sampler_logprob,  # or None
    value,
    slope,
    num_rows,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    current = load_float32(logprob, rows, inside)
    weight = tl.full([BLOCK], 1.0, tl.float32)
    if sampler_logprob is not None:
        weight = tl.exp(clamped(current - load_float32(sampler_logprob, rows, inside)))
    row_value, row_slope = kl_terms(current, load_float32(reference_logprob, rows, inside), weight, KIND)
    tl.store(value + rows, row_value, mask=inside)
    tl.store(slope + rows, row_slope, mask=inside)
