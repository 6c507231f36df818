"""PsiPO, preference optimisation for any function Psi: targets and losses (Azar et al. 2023, arXiv 2310.12036).

    objective   E_{y~pi, y'~mu} Psi(p(y > y')) - tau KL(pi || pi_ref)                                      (eq. 6)
    optimum     pi*(y) = pi_ref(y) exp(g(y) / tau) / Z,   g(y) = E_{y'~mu} Psi(p(y > y'))                  (eq. 7, 9)
    so that     u_i - u_j = (g_i - g_j) / tau   with the log-ratios u_i = log pi(y_i) / pi_ref(y_i)        (eq. 12)

IPO is Psi = identity; with Psi = logit and Bradley-Terry preferences, g is the reward and the optimum equals that of
RLHF and DPO (proposition 1). Three back-ends reach the optimum:

    pairwise    (u_w - u_l - target)^2 over pairs, `pair_target`: exact where Psi is odd about 1/2, wrong elsewhere
    groupwise   regression of u over K responses per prompt, `group_target` and `group_loss`: exact for any Psi
    reward      g as the reward of PPO with KL coefficient tau, `group_rewards` and `psi_judge`

Targets are computed once, before training, in float64. The functions of this module need no model. Legend: B pairs, K
responses of a prompt drawn from mu, G groups, N responses of all groups; P [K, K] holds p(y_i > y_j), with 1/2 on its
diagonal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastrlhf.config.functions import load_function
from fastrlhf.types import Prefix, Rollout, TokenizedExample
from fastrlhf_kernels import LossOutput
from fastrlhf_kernels.types import Sum

if TYPE_CHECKING:
    from fastrlhf.evaluation.judges import Judge

Estimator = Literal["self_included", "leave_two_out"]
GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)
"""Probabilities at which user-defined functions are examined; the grid is symmetric about 1/2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Psi:
    """A non-decreasing function of a probability. Call it with float64 probabilities of any shape.

    Raises ValueError if a value is not finite.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    is_odd: bool
    """Whether Psi is odd about 1/2: Psi(q) + Psi(1 - q) is constant. Only then is the pairwise back-end exact."""
    is_affine: bool
    """Whether Psi is affine. Only then E Psi(label) = Psi(E label), so that one hard label per pair is unbiased."""

    def __call__(self, prob: Tensor) -> Tensor:
        value = self.function(prob)
        if not bool(value.isfinite().all()):
            bad = prob[~value.isfinite()].flatten()[0].item()
            raise ValueError(
                f"psi: {self.name} of the probability {bad:g} is not finite, so no value of tau could keep the "
                "policy near the reference; use clipped_logit, or smooth the probabilities"
            )
        return value


def load_psi(name: str, clip: float) -> Psi:
    """Returns the Psi with this name.

        identity        q, which is IPO
        logit           log(q / (1 - q)); infinite at 0 and 1, which are refused
        clipped_logit   logit between -clip and clip nats: no preference counts as surer than sigmoid(clip)
        module:name     a user-defined function, float64 tensor -> float64 tensor of the same shape; the module may be a
                        file, for example `my_psi.py:rank`

    Raises ValueError for an unknown name, and for a function that is not finite or decreases somewhere on [0, 1].
    """
    if name == "identity":
        return Psi(name=name, function=lambda q: q, is_odd=True, is_affine=True)
    if name == "logit":
        return Psi(name=name, function=torch.logit, is_odd=True, is_affine=False)
    if name == "clipped_logit":
        return Psi(name=name, function=lambda q: q.logit().clamp(-clip, clip), is_odd=True, is_affine=False)
    if ":" not in name:
        raise ValueError(f"psi: {name!r} is unknown; give identity, logit, clipped_logit or module:function")
    return examined(load_function(name, "psi"), name)


def examined(function: Callable[[Tensor], Tensor], name: str) -> Psi:
    """Makes a Psi from a user-defined function; checks on a grid of [0, 1] whether it is odd and affine."""
    values = function(GRID)
    if not isinstance(values, Tensor) or values.shape != GRID.shape:
        raise ValueError(f"psi: {name} must return a tensor of the shape of its argument, {tuple(GRID.shape)}")
    if not bool(values.isfinite().all()):
        bad = GRID[~values.isfinite()][0].item()
        raise ValueError(
            f"psi: {name} is not finite at {bad:g}, so no value of tau could keep the policy near the reference there; "
            "clip it, as clipped_logit clips logit"
        )
    falls = (values.diff() < 0).nonzero()
    if len(falls):
        first = int(falls[0, 0])
        raise ValueError(f"psi: {name} must be non-decreasing; it falls from {GRID[first]:g} to {GRID[first + 1]:g}")
    # Tolerance for the rounding of the function, which may compute in another dtype.
    eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    tolerance = max(1e-9, 32 * eps) * max(1.0, float(values.abs().max()))
    values = values.double()
    line = values[0] + GRID * (values[-1] - values[0])
    return Psi(
        name=name,
        function=function,
        is_odd=float((values + values.flip(0) - values[0] - values[-1]).abs().max()) <= tolerance,
        is_affine=float((values - line).abs().max()) <= tolerance,
    )


def label_probability(wins: Tensor, labels: Tensor, smoothing: float = 0.5) -> Tensor:
    """Returns P(chosen > rejected) from `wins` of `labels` comparisons: (a + wins) / (2 a + labels), in float64.

    This is the posterior mean under a Beta(a, a) prior, a = `smoothing`. With a = 1/2 it stays 1 / (2 labels + 2) away
    from 0 and 1. Raises ValueError for invalid counts, and for a pair without labels if `smoothing` is 0.
    """
    if smoothing < 0:
        raise ValueError(f"smoothing: must be at least 0; got {smoothing}")
    if bool(((wins < 0) | (wins > labels)).any()):
        raise ValueError("wins: must be in 0..labels")
    if smoothing == 0 and bool((labels == 0).any()):
        raise ValueError("labels: a pair without labels has no probability unless smoothing is above 0")
    return (smoothing + wins.double()) / (2 * smoothing + labels.double())


def pair_target(psi: Psi, prob: Tensor, tau: float) -> Tensor:
    """Returns the targets of the pairwise back-end, [B] float32 in nats: (Psi(p) - Psi(1 - p)) / (2 tau).

    p is the probability that chosen wins. The result is the `target` of fastrlhf_kernels.pair_loss(kind="ipo"). With
    Psi = identity it is (p - 1/2) / tau; for p = 1 this is 1 / (2 tau), the IPO of eq. 17. Raises ValueError if Psi is
    not odd about 1/2, because the pairs then have another optimum than eq. 9, and for hard labels under a Psi that is
    not affine, because E Psi(label) is then not Psi(p).
    """
    if not psi.is_odd:
        raise ValueError(
            f"psi: {psi.name} is not odd about 1/2 (Psi(q) + Psi(1 - q) is not constant), so pairs lead to another "
            "policy than PsiPO's; use psi_backend groupwise"
        )
    p = prob.double()
    check_not_hard(psi, p)
    return ((psi(p) - psi(1 - p)) / (2 * tau)).float()


def check_not_hard(psi: Psi, prob: Tensor) -> None:
    """Raises ValueError if Psi is not affine and all probabilities are 0 or 1, that is, hard labels."""
    if not psi.is_affine and bool(((prob == 0) | (prob == 1)).all()):
        raise ValueError(
            f"psi: {psi.name} needs probabilities, and every label is hard: E Psi(label) is not Psi(E label); use "
            "identity, or another label_source"
        )


def reward_preferences(scores: Tensor) -> Tensor:
    """Converts rewards [..., K] to Bradley-Terry preferences P [..., K, K] float64: sigmoid(r_i - r_j)."""
    r = scores.double()
    return torch.sigmoid(r[..., :, None] - r[..., None, :])


def group_rewards(preference: Tensor, psi: Psi) -> Tensor:
    """Computes g of eq. 7, [..., K] float64, from P [..., K, K]; mu is the uniform distribution over the K responses.

    y_i itself is among the K responses and adds Psi(1/2) / K; leaving it out would inflate g_i - g_j by K / (K - 1).
    """
    return psi(preference.double()).mean(-1)


def group_target(preference: Tensor, psi: Psi, tau: float, estimator: Estimator) -> Tensor:
    """Returns the targets of the groupwise back-end: log-ratios [..., K] float64 in nats, up to a constant, from P
    [..., K, K].

    With K responses drawn from mu, M = Psi(P), and the mean over pairs i < j of (u_i - u_j - t_ij)^2 as the loss,

        self_included   t_ij = (g_i - g_j) / tau of `group_rewards`: exact in expectation for an odd Psi, at any K >= 2;
                        at K = 2 it is `pair_target`
        leave_two_out   t_ij = sum over l not in {i, j} of (M_il - M_jl) / ((K - 2) tau): exact for any Psi, K >= 3

    and the target is the u that minimises this loss. Raises ValueError if the estimator does not suit Psi or K.
    """
    size = preference.shape[-1]
    if estimator == "self_included":
        if not psi.is_odd:
            raise ValueError(f"psi: {psi.name} is not odd about 1/2: self_included is biased, use leave_two_out")
        return group_rewards(preference, psi) / tau
    if size < 3:
        raise ValueError(
            f"psi: {psi.name} is not odd about 1/2 and therefore needs at least 3 responses per prompt; got {size}"
        )
    value = psi(preference.double())
    diagonal = value.diagonal(dim1=-2, dim2=-1)
    rows, columns = (value.sum(dim) - diagonal for dim in (-1, -2))
    target = ((size - 1) * rows + columns) / (size * (size - 2) * tau)  # the mean over j of t_ij, + a constant
    return target - target.mean(-1, keepdim=True)


def group_loss(log_ratio: Tensor, target: Tensor, cu_groups: Tensor, *, num_groups: float) -> LossOutput:
    """Returns the sum over groups of the mean over pairs i < j of (u_i - u_j - (t_i - t_j))^2, divided by num_groups.

    That mean is twice the sample variance of u - t, so the loss costs O(N). log_ratio and target [N]; cu_groups [G+1]
    int: group i consists of members cu_groups[i] to cu_groups[i+1] - 1, at least two. The gradient flows only to
    log_ratio.

    Metrics, as sums over groups: loss; groups; and, over the pairs of a group with t_i > t_j: ordered (1 if there
    are any), accuracy (share of pairs with u_i > u_j), margin (u_i - u_j), target_margin (t_i - t_j).
    """
    sizes = cu_groups.diff().long()
    group = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=len(log_ratio))
    error = log_ratio - target
    # The mean needs no gradient: deviations from it sum to 0.
    mean = _group_sums(error.detach(), cu_groups)[group] / sizes[group]
    loss = (2 * (error - mean).square() / (sizes - 1)[group]).sum()

    u, t = log_ratio.detach(), target
    above = (group[:, None] == group[None]) & (t[:, None] > t[None])
    pairs = _group_sums(above.sum(1).to(u.dtype), cu_groups)
    weight = above / pairs.clamp(min=1)[group, None]
    metrics = {
        "loss": loss.detach(),
        "groups": sizes.new_tensor(len(sizes)).to(u.dtype),
        "ordered": (pairs > 0).sum().to(u.dtype),
        "accuracy": (weight * (u[:, None] > u[None])).sum(),
        "margin": (weight * (u[:, None] - u[None])).sum(),
        "target_margin": (weight * (t[:, None] - t[None])).sum(),
    }
    return LossOutput(loss / num_groups, {name: Sum(value) for name, value in metrics.items()})


def psi_judge(judge: Judge, opponents: Sequence[Rollout] | None, psi: Psi) -> Judge:
    """Makes the judge of the reward back-end: its score of y is the mean over y' of Psi(sigmoid(r(y) - r(y'))).

    r is `judge`. y' are the `opponents` with the same prompt (see `dataset_opponents`), which are scored once, during
    this call; mu is then the dataset's distribution, and PPO with KL coefficient tau and no other reward converges to
    eq. 9. If `opponents` is None, they are the other rollouts of the same prompt in the call: mu is then the sampler
    itself, and training approaches the equilibrium of self-play. A rollout is not its own opponent, which would shrink
    every difference of rewards by (n - 1) / n. A prompt without an opponent raises ValueError, naming its row.
    """
    known: Mapping[tuple[int, ...], Tensor] = {}
    if opponents is not None:
        known = {key: scores for key, (_, scores) in _by_prompt(judge, opponents).items()}

    def judged(rollouts: Sequence[Rollout]) -> Tensor:
        rewards = torch.empty(len(rollouts))
        for key, (indices, own) in _by_prompt(judge, rollouts).items():
            wins = psi(torch.sigmoid(own[:, None] - (own if opponents is None else known.get(key, own[:0]))[None]))
            others = wins.shape[1] - (opponents is None)
            if others == 0:
                row = rollouts[indices[0]].prefix.row
                raise ValueError(f"psi_judge: the prompt of row {row} has no response to compare with")
            total = wins.sum(1) - (wins.diagonal() if opponents is None else 0)
            rewards[indices] = (total / others).float()
        return rewards

    return judged


def dataset_opponents(
    examples: Sequence[TokenizedExample], fields: Sequence[str] = ("chosen", "rejected", "reference")
) -> list[Rollout]:
    """Converts the responses of examples (`responses`, or the `fields` that are present) to rollouts, for
    `psi_judge`."""
    return [
        Rollout(
            prefix=Prefix(token_ids=example.prompt, num_reset=0, row=example.row, episode=-1),
            completion=response,
            sampler_logprob=[],
            ended=True,
        )
        for example in examples
        for response in example.responses or [getattr(example, field) for field in fields]
        if response
    ]


def _by_prompt(judge: Judge, rollouts: Sequence[Rollout]) -> dict[tuple[int, ...], tuple[list[int], Tensor]]:
    """Groups rollouts by prompt: prompt -> (indices of its rollouts, their scores [n] float64 on the CPU)."""
    scores = torch.as_tensor(judge(rollouts)).double().cpu()
    indices: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        prefix = rollout.prefix
        indices[tuple(prefix.token_ids[: len(prefix.token_ids) - prefix.num_reset])].append(i)
    return {prompt: (members, scores[members]) for prompt, members in indices.items()}


def _group_sums(values: Tensor, cu_groups: Tensor) -> Tensor:
    """Sums [N] over groups to [G], in a fixed order."""
    return torch.segment_reduce(values, "sum", offsets=cu_groups.long(), unsafe=True)
