"""Auxiliary loss of mixture-of-experts models (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6), which makes routers
balance the load of the experts.

    aux = E * sum over experts i of f_i * P_i

f_i is the share of routing decisions (times the experts per token) that went to expert i, P_i its mean routing
probability, both over the tokens and layers of one sequence. The loss of a step is `router_aux_loss_coef` times the
mean over its sequences. For a single sequence it equals transformers' loss. transformers computes the shares over the
padded batch of each forward pass, so its gradient depends on how a step is divided; here, micro-batches, ranks and
shared prompts do not change the gradient.

Trainers do not add this loss to theirs: `with_router_loss` returns the hidden states unchanged and adds the gradient in
the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.distributed.ranks import total
from fastrlhf.types import PackedBatch

_STATE = "fastrlhf_router_loss"


@dataclass(kw_only=True)
class _State:
    coef: float
    experts_per_token: int
    num_sequences: int = 0
    """Number of sequences of the optimiser step, over all ranks."""
    sum: Tensor | None = None
    """Sum of aux over the sequences of this rank since the step began."""


def set_router_loss(model: PreTrainedModel, coef: float | None) -> None:
    """Adds the auxiliary loss to all later backward passes of the model. `coef` None: the coefficient in its
    configuration.

    A model without router logits is unchanged; ValueError is raised if `coef` is above 0 for such a model.
    """
    config = model.config.get_text_config()
    known = "router_logits" in (getattr(model.base_model, "_can_record_outputs", None) or {})
    per_token = getattr(config, "num_experts_per_tok", None)
    if coef is None:
        coef = getattr(config, "router_aux_loss_coef", None) if known and per_token else None
    elif coef > 0 and not (known and per_token):
        raise ValueError(f"router_aux_loss_coef: {type(model).__name__} gives no router logits; leave the key out")
    setattr(model, _STATE, _State(coef=coef, experts_per_token=cast(int, per_token)) if coef else None)


def begin_step(model: PreTrainedModel, num_sequences: int) -> None:
    """Begins an optimiser step of `num_sequences` sequences over all ranks. It must be called before the first backward
    pass of the step."""
    if state := _state(model):
        state.num_sequences, state.sum = num_sequences, None


def router_loss(model: Module) -> float | None:
    """Returns the mean auxiliary loss over the sequences of the step, without the coefficient; None if the model has no
    auxiliary loss. Every rank must call it."""
    state = _state(model)
    if state is None or not state.num_sequences:
        return None
    own = torch.zeros((), device=next(model.parameters()).device) if state.sum is None else state.sum
    return total(own).item() / state.num_sequences


def wanted(model: PreTrainedModel) -> dict[str, bool]:
    """Returns the keywords by which the backbone's forward pass returns router logits; empty if no auxiliary loss is
    needed."""
    return {"output_router_logits": True} if torch.is_grad_enabled() and _state(model) else {}


def with_router_loss(model: PreTrainedModel, batch: PackedBatch, output: Any) -> Tensor:
    """Returns the hidden states of `output` [1, T, D]; their backward pass adds the gradient of the auxiliary loss."""
    state, hidden = _state(model), output.last_hidden_state
    if not wanted(model) or state is None or not hidden.requires_grad:
        return hidden
    if not state.num_sequences:
        raise RuntimeError("router_loss.begin_step must be called before the backward passes of a step")
    aux = balance(output.router_logits, state.experts_per_token, batch).sum()
    state.sum = aux.detach() if state.sum is None else state.sum + aux.detach()
    return cast(Tensor, _AddGradient.apply(hidden, aux * (state.coef / state.num_sequences)))


def balance(router_logits: tuple[Tensor, ...], experts_per_token: int, batch: PackedBatch) -> Tensor:
    """Returns the auxiliary loss of every segment of a pack, 0 for segments with children. router_logits: [T, E] per
    layer.

    A sequence consists of all tokens that its last token attends to, so the tokens of a shared prompt count in every
    branch.
    """
    plan, chosen, probs = batch.plan, None, None
    for logits in router_logits:
        routed = logits.reshape(-1, logits.shape[-1]).float().softmax(-1)
        picked = torch.zeros_like(routed).scatter_(1, routed.detach().topk(experts_per_token, -1).indices, 1.0)
        chosen = picked if chosen is None else chosen + picked
        probs = routed if probs is None else probs + routed
    assert chosen is not None
    assert probs is not None
    if plan.key_index is not None:
        chosen, probs = chosen[plan.key_index], probs[plan.key_index]
    lengths = plan.cu_seqlens_k.diff().long()
    share, mean = (torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True) for x in (chosen, probs))
    decisions = len(router_logits) * lengths
    aux = probs.shape[1] * (share * mean).sum(1) / decisions.clamp(min=1) ** 2
    return torch.where(torch.isin(plan.cu_seqlens[1:] - 1, batch.last), aux, 0.0)


class _AddGradient(Function):
    """An identity function whose backward pass also backpropagates through a loss, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, torch.ones((), device=gradient.device)


def _state(model: Module) -> _State | None:
    return getattr(model, _STATE, None)
