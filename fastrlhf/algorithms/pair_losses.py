"""Computes the losses of `fastrlhf dpo` by name: built-in losses by the kernel `pair_loss`, others by user-defined
functions.

name                      kind of pair_loss   reference   length_norm   paper
sigmoid (DPO)             dpo                 yes         sum           arXiv 2305.18290, eq. 7
ipo                       ipo                 yes         mean          arXiv 2310.12036, eq. 17
hinge, robust             hinge, robust       yes         sum           arXiv 2305.10425; arXiv 2403.00409
apo_zero, apo_down        apo_zero, apo_down  yes         sum           arXiv 2408.06266, eq. 7 and 8
simpo                     dpo, with a margin  no          mean          arXiv 2405.14734, eq. 6
cpo (with sft)            dpo                 no          sum           arXiv 2401.08417, eq. 3
orpo (with sft)           orpo                no          mean          arXiv 2403.07691, eq. 6
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastrlhf.algorithms.scoring import Tree
from fastrlhf.config import DPOConfig
from fastrlhf.config.functions import load_function
from fastrlhf_kernels import LossOutput, pair_loss

KINDS = {"sigmoid": "dpo", "simpo": "dpo", "cpo": "dpo"}
"""Loss name -> `kind` argument of `pair_loss`, for losses that have different names there."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The inputs of the loss for a set of pairs, all in the same order."""

    trees: Sequence[Tree]
    label_prob: Tensor | None
    """[B] float32 on the CPU, like the fields below: P(chosen is better); None if every label is hard"""
    target: Tensor | None
    """[B] float32 nats, PsiPO's target of the difference of log-ratios; None if psi is the identity"""
    margin: Tensor | None
    """[B] float32, in the units of beta times nats"""

    def __getitem__(self, indices: Sequence[int]) -> Pairs:
        rows = list(indices)
        return Pairs(
            trees=[self.trees[i] for i in rows],
            label_prob=None if self.label_prob is None else self.label_prob[rows],
            target=None if self.target is None else self.target[rows],
            margin=None if self.margin is None else self.margin[rows],
        )

    def __len__(self) -> int:
        return len(self.trees)

    @property
    def num_chosen_tokens(self) -> int:
        return sum(tree[-2].num_scored for tree in self.trees)


PairFunction = Callable[[Tensor, Tensor], Tensor]
"""User-defined loss: (log-ratios of the chosen [B], of the rejected [B]) -> losses [B]; float32, nats"""


def loss_of_pairs(
    config: DPOConfig,
    name: str,
    logprob: Tensor,
    reference_logprob: Tensor | None,
    cu_rows: Tensor,
    pairs: Pairs,
    num_pairs: int,
) -> LossOutput:
    """Computes one of `config.losses` over `pairs`, divided by `num_pairs`, the number of pairs of the optimiser step.

    logprob [T] in nats, of all rows of the sequences that `cu_rows` [2B + 1] delimits, chosen and rejected in turn;
    reference_logprob [2B] per sequence, which losses without a reference do not read. The metrics are those of
    `pair_loss`.
    """
    free = name in config.reference_free_losses
    label_prob, target, margin = (
        None if column is None else column.to(logprob.device, non_blocking=True)
        for column in (pairs.label_prob, pairs.target, pairs.margin)
    )
    if name == "simpo":
        gamma = torch.full((len(pairs),), config.simpo_gamma, device=logprob.device)
        margin = gamma if margin is None else margin + gamma
    user_defined = name in config.functions
    output = pair_loss(
        logprob,
        None if free else reference_logprob,
        cu_rows,
        torch.ones_like(logprob, dtype=torch.bool),
        num_pairs=num_pairs,
        kind="dpo" if user_defined else KINDS.get(name, name),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        label_prob=label_prob if target is None else None,
        margin=margin,
        target=target,
        length_norm=config.length_norm_of(name),
    )
    if not user_defined:
        return output
    # The loss of pair_loss is replaced; its metrics, which depend on the log-ratios and on beta only, stay.
    log_ratio = torch.segment_reduce(logprob, "sum", offsets=cu_rows.long(), unsafe=True)
    if reference_logprob is not None and not free:
        log_ratio = log_ratio - reference_logprob
    losses = pair_function(name)(*_normed(log_ratio, cu_rows, config.length_norm_of(name)).unbind(1))
    return LossOutput(losses.sum() / num_pairs, output.metrics)


def _normed(log_ratio: Tensor, cu_rows: Tensor, norm: str) -> Tensor:
    """Converts log-ratios [2B] to [B, 2], divided by the lengths that `norm` names."""
    lengths = cu_rows.diff().view(-1, 2).float()
    if norm == "pair_mean":
        lengths = lengths.mean(1, keepdim=True)
    return log_ratio.view(-1, 2) / (1 if norm == "sum" else lengths)


@cache
def pair_function(name: str) -> PairFunction:
    """Returns the user-defined loss with this name. Raises ValueError if it does not give one finite loss per pair, or
    no gradient, on a trial call with two pairs."""
    function = load_function(name, "loss_type")
    chosen, rejected = torch.tensor([[-1.0, 0.5], [-2.0, 1.0]], requires_grad=True).unbind(0)
    try:
        losses = function(chosen, rejected)
    except Exception as error:
        raise ValueError(
            f"loss_type: {name} failed on a trial call with two pairs: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(losses, Tensor) or losses.shape != (2,) or not bool(losses.isfinite().all()):
        raise ValueError(
            f"loss_type: {name} must give a finite loss for every pair; a trial call with the log-ratios of two pairs "
            f"gave {losses!r}"
        )
    if not losses.requires_grad:
        raise ValueError(f"loss_type: {name} gives a loss without a gradient; compute it from its arguments in torch")
    return function


def describe_target(config: DPOConfig, pairs: Pairs) -> str:
    """Describes the margin that IPO aims at, (1 - 2 label_smoothing) / (2 tau), per token and per response."""
    target = (1 - 2 * config.label_smoothing) / (2 * config.beta)
    length = sum(tree[-1].num_scored + tree[-2].num_scored for tree in pairs.trees) / (2 * len(pairs))
    per_response, per_token = (target, target / length)
    if config.length_norm_of("ipo") != "sum":
        per_response, per_token = target * length, target
    return (
        f"ipo: beta (tau) {config.beta:g} with length_norm {config.length_norm_of('ipo')} asks for a margin of "
        f"{per_token:.3g} nats per token, {per_response:.3g} per response of {length:.1f} tokens"
    )


def check_first_loss(config: DPOConfig, pairs: Pairs, means: Mapping[str, float]) -> None:
    """Raises ValueError if a loss is not that of a policy equal to its reference: ln 2 for DPO, 1 for hinge, (1 / (2
    tau))^2 for IPO; other values with margins or soft labels. Losses without a reference are not checked.

    The log-ratios of such a policy are 0 except for rounding: 3e-5 of a response's log-prob is allowed, 1e-2 in
    bfloat16.
    """
    size = abs(means["logprob_chosen"]) + abs(means["logprob_rejected"])
    rounding = (3e-5 if config.dtype == "float32" else 1e-2) * size
    for name in config.losses:
        if name == "sft" or name in config.reference_free_losses:
            continue
        shifts = (-rounding, 0.0), (rounding, 0.0), (0.0, -rounding), (0.0, rounding)
        expected = _loss_at(config, name, pairs, 0.0, 0.0)
        allowed = max(abs(_loss_at(config, name, pairs, *shift) - expected) for shift in shifts)
        loss = means[f"loss/{name}"]
        if not abs(loss - expected) <= allowed + 1e-6:
            raise ValueError(
                f"the first {name} loss is {loss:.6g}, but a policy that equals its reference has {expected:.6g}: "
                "log-probs of the same tokens differ between two passes, so the model is not deterministic"
            )


def _loss_at(config: DPOConfig, name: str, pairs: Pairs, chosen: float, rejected: float) -> float:
    """Returns the mean loss that the pairs would have if each had these log-ratios."""
    logprob = torch.tensor([chosen, rejected]).repeat(len(pairs))
    cu_rows = torch.arange(2 * len(pairs) + 1, dtype=torch.int32)
    return loss_of_pairs(config, name, logprob, None, cu_rows, pairs, len(pairs)).loss.item()
