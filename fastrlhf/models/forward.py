"""Computes the hidden states of a pack, and from them log-probs, values and scores, without ever storing logits [T,
V]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastrlhf.models.alone import states_one_by_one
from fastrlhf.models.attention import chosen_attention, packed_attention, runs_alone
from fastrlhf.models.offload import offloaded
from fastrlhf.models.router_loss import wanted, with_router_loss
from fastrlhf.models.sharding import backbone_of, runs_in_step
from fastrlhf.models.vocabulary import head_of, rows_of
from fastrlhf.types import KeptTokens, PackedBatch
from fastrlhf_kernels import (
    LossOutput,
    TokenKL,
    TokenLogprobs,
    linear_kept_logprob,
    linear_kl,
    linear_logprob,
    linear_nll,
    linear_policy_loss,
)

_NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")  # transformers 5.17 has only the old name
CHECKPOINTING = "activation_checkpointing" if _NEW_NAME else "gradient_checkpointing"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMap:
    """How logits are computed from hidden states h: cap * tanh(scale * (W h + b) / cap), where W and b belong to the
    head."""

    scale: float = 1.0
    softcap: float | None = None
    """None: no tanh."""
    at_head: bool = False
    """True: h is the input of the head rather than the output of the backbone, because there are more layers between
    them."""


_LOGITS = "fastrlhf_logits"  # attribute of a model with its LogitMap; copies of the model have it too


def set_logit_map(model: PreTrainedModel, found: LogitMap) -> None:
    """Stores the LogitMap of a model, which models/probe.py has measured."""
    setattr(model, _LOGITS, found)


def logit_map(model: PreTrainedModel) -> LogitMap:
    """Returns the stored LogitMap of a model or, if there is none, the one that known keys of its configuration
    describe."""
    if hasattr(model, _LOGITS):
        return getattr(model, _LOGITS)
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitMap(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Returns the last hidden states [T, D] of a pack, in the dtype of the weights."""
    recomputes = torch.is_grad_enabled() and getattr(model, f"is_{CHECKPOINTING}")
    with _training(_recomputed_layers(model)) if recomputes else nullcontext():
        if runs_alone(model):
            states, *routers = states_one_by_one(partial(_own_states, model), batch, in_step=runs_in_step(model))
            output = SimpleNamespace(last_hidden_state=states[None], router_logits=tuple(routers))
        else:
            with packed_attention(model):
                output = _output(
                    model,
                    input_ids=batch.token_ids[None],
                    position_ids=batch.positions[None],
                    attention_plan=batch.plan,
                    attention_backend=chosen_attention(model),
                )
    return with_router_loss(model, batch, output)[0]


def _own_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Returns, for sequences [B, L], the hidden states [B, L, D] and, if needed, the router logits [B, L, E] of every
    layer."""
    output = _output(model, input_ids=ids)
    routers = output.router_logits if wanted(model) else ()
    return [output.last_hidden_state, *(logits.reshape(*ids.shape, -1) for logits in routers)]


def _output(model: PreTrainedModel, **inputs: Any) -> Any:
    """Returns the output of the backbone: `last_hidden_state` [B, L, D] and, if needed, `router_logits`."""
    keywords = {"use_cache": False, **wanted(model), **inputs}
    if not logit_map(model).at_head:
        return backbone_of(model)(**keywords)
    if wanted(model):
        raise ValueError(f"router_aux_loss_coef: not supported for {type(model).__name__}; set it to 0")
    return SimpleNamespace(last_hidden_state=head_input(model, **keywords))


def head_input(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Returns [B, L, D], the input of the model's head; the head itself is not computed."""
    head = cast(Module, model.get_output_embeddings())
    with head.register_forward_pre_hook(_stop):
        try:
            model(**inputs)
        except _HeadReachedError as reached:
            return reached.hidden
    raise ValueError(f"{type(model).__name__}: its forward does not call its head")


class _HeadReachedError(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(module: Module, arguments: tuple[Tensor]) -> None:
    raise _HeadReachedError(arguments[0])


def enable_activation_checkpointing(model: PreTrainedModel, *, offload_to: torch.device | None = None) -> None:
    """Turns on activation checkpointing: each layer of the backbone keeps only its input (on the device `offload_to` if
    one is given) and is recomputed in the backward pass.

    Raises ValueError if the model has no layers that can be recomputed.
    """
    layers = _recomputed_layers(model)
    if not layers or not model.supports_gradient_checkpointing:
        raise ValueError(f"activation_checkpointing: {type(model).__name__} does not support it; set it to false")
    settings = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _again(model, layers))}
    getattr(model, f"{CHECKPOINTING}_enable")(settings)
    if offload_to is not None:
        # transformers' own `offload` copies on the stream of the computation, which then waits for every copy.
        offloading = offloaded(partial(checkpoint, **settings), offload_to)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                cast(Any, module)._gradient_checkpointing_func = offloading


def disable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Turns activation checkpointing off in a copy of a model, whose layers would otherwise be recomputed with the
    attention of the original and would keep the original in memory."""
    if getattr(model, f"is_{CHECKPOINTING}"):
        getattr(model, f"{CHECKPOINTING}_disable")()


def _recomputed_layers(model: PreTrainedModel) -> list[Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _again(model: PreTrainedModel, layers: Sequence[Module]) -> Iterator[None]:
    """Context for recomputing a layer in the backward pass, with the attention and the mode of the forward pass."""
    with _training(layers), nullcontext() if runs_alone(model) else packed_attention(model):
        yield


@contextmanager
def _training(layers: Sequence[Module]) -> Iterator[None]:
    """Context in which the layers, but not their submodules, are in training mode; transformers recomputes layers only
    in that mode."""
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.training = mode


def scored_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Returns the hidden states [R, D] that predict the scored tokens."""
    return hidden_states(model, batch)[batch.rows]


def token_logprobs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float | Tensor = 1.0,
    kept: KeptTokens | None = None,
    entropy: bool = False,
    stats: bool = False,
) -> TokenLogprobs:
    """Returns the log-prob [R] float32, in nats, of every scored token of the pack at `temperature`. If `kept` is
    given, the distribution of each row is restricted to its `kept` tokens."""
    states = scored_states(model, batch)
    return state_logprobs(
        model,
        states,
        batch.targets,
        temperature=temperature,
        kept=kept,
        entropy=entropy,
        stats=stats,
        skip_rows=False,  # losses of whole sequences have a gradient in every row
    )


def state_logprobs(
    model: PreTrainedModel,
    states: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    kept: KeptTokens | None = None,
    entropy: bool = False,
    stats: bool = False,
    skip_rows: bool = True,
) -> TokenLogprobs:
    """Computes the log-probs of `token_logprobs` from given `scored_states` [R, D]; targets [R] int64, temperature a
    number or [R]. `stats` and `skip_rows` (see `linear_logprob`) are ignored with `kept`."""
    weight, bias = head_of(model, by_id=kept is not None)
    found = logit_map(model)
    if kept is not None:
        return linear_kept_logprob(
            states,
            weight,
            targets,
            kept.ids,
            kept.cu_rows,
            bias=bias,
            temperature=temperature,
            logit_scale=found.scale,
            softcap=found.softcap,
            entropy=entropy,
        )
    return linear_logprob(
        states,
        weight,
        rows_of(model, targets),
        bias=bias,
        temperature=temperature,
        logit_scale=found.scale,
        softcap=found.softcap,
        entropy=entropy,
        stats=stats,
        skip_rows=skip_rows,
    )


def token_nll(model: PreTrainedModel, batch: PackedBatch, *, num_tokens: float, form: str = "auto") -> Tensor:
    """Returns the sum [] float32 of the negative log-probs, in nats, of all scored tokens of the pack, divided by
    `num_tokens`. `form` is that of `linear_nll`: whether the gradients of the head are computed in the forward pass
    ("one_shot"), in the backward pass ("two_steps") or in the one that is faster."""
    states = scored_states(model, batch)
    (weight, bias), found = head_of(model), logit_map(model)
    targets = rows_of(model, batch.targets)
    options: dict[str, Any] = {"bias": bias, "logit_scale": found.scale, "softcap": found.softcap}
    return linear_nll(states, weight, targets, num_tokens=num_tokens, form=form, **options).loss


def state_policy_loss(
    model: PreTrainedModel,
    states: Tensor,
    targets: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    **options: Any,
) -> LossOutput:
    """Computes PPO's loss and its metrics from given `scored_states` [R, D]; targets [R] int64, the other rows [R].
    `options` are those of `linear_policy_loss`, which chooses whether the gradients are computed in the forward or in
    the backward pass."""
    (weight, bias), found = head_of(model), logit_map(model)
    rows = (rows_of(model, targets), sampler_logprob, advantage, mask)
    options |= {"bias": bias, "logit_scale": found.scale, "softcap": found.softcap}
    return linear_policy_loss(states, weight, *rows, **options)


def state_kl(
    model: PreTrainedModel,
    states: Tensor,
    reference: PreTrainedModel,
    reference_states: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
) -> TokenKL:
    """Returns KL(model || reference) [R] float32, in nats, between the next-token distributions of two models with the
    same architecture, from the `scored_states` [R, D] of each. Gradients flow to `model` and `states`."""
    (weight, bias), (reference_weight, reference_bias) = head_of(model), head_of(reference, gathered=True)
    found = logit_map(model)
    return linear_kl(
        states,
        weight,
        reference_states,
        reference_weight,
        targets=rows_of(model, targets),
        bias=bias,
        reference_bias=reference_bias,
        temperature=temperature,
        logit_scale=found.scale,
        softcap=found.softcap,
        entropy=entropy,
    )


def sequence_scores(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Returns the scores [N] float32 that a reward model gives at the last token of every sequence. The head runs in
    float32."""
    return read_scores(model, hidden_states(model, batch)[batch.last])


def read_scores(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the scores [N] float32 that the head computes from hidden states [N, D]. The head runs in float32."""
    return cast(Linear, model.score)(hidden.float())[:, 0]


def token_values(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Returns the values [R] float32 of the states that predict the scored tokens. The head runs in float32."""
    return read_scores(model, hidden_states(model, batch)[batch.rows])
