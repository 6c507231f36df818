"""The packed forward: hidden states of a pack, and what is read from them. Logits [T, V] never exist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastrlhf.data.packing import pack
from fastrlhf.models.attention import chosen_attention, packed_attention
from fastrlhf.models.offload import offloaded
from fastrlhf.models.router_loss import wanted, with_router_loss
from fastrlhf.models.sharding import backbone_of
from fastrlhf.models.vocabulary import head_of
from fastrlhf.types import PackedBatch, Segment
from fastrlhf_kernels import TokenKL, TokenLogprobs, linear_kl, linear_logprob

_NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")  # transformers 5.17 has the old one
CHECKPOINTING = "activation_checkpointing" if _NEW_NAME else "gradient_checkpointing"


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The backbone's last hidden states [T, D], in the dtype of the weights."""
    # Layers recompute in training mode alone; nothing else depends on the mode, for there is no dropout.
    recomputes = torch.is_grad_enabled() and getattr(model, f"is_{CHECKPOINTING}")
    with packed_attention(model), _training_mode(model) if recomputes else nullcontext():
        output = backbone_of(model)(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            attention_plan=batch.plan,
            attention_backend=chosen_attention(model),
            use_cache=False,
            **wanted(model),
        )
    return with_router_loss(model, batch, output)[0]


def enable_activation_checkpointing(model: PreTrainedModel, *, offload_to: torch.device | None = None) -> None:
    """From now on each layer of the backbone keeps its input alone, on the device `offload_to` where one is given, and
    is computed again in the backward."""
    again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), packed_attention(model))}
    getattr(model, f"{CHECKPOINTING}_enable")(again)
    if offload_to is not None:
        # transformers' own `offload` copies on the stream that computes, which then waits for every copy.
        offloading = offloaded(partial(checkpoint, **again), offload_to)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                cast(Any, module)._gradient_checkpointing_func = offloading


def disable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Of a copy: its layers would compute again with the attention of the model that they were copied from, and keep
    that one alive."""
    if getattr(model, f"is_{CHECKPOINTING}"):
        getattr(model, f"{CHECKPOINTING}_disable")()


@contextmanager
def _training_mode(model: PreTrainedModel) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def scored_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The hidden states [R, D] from which the scored tokens were chosen."""
    return hidden_states(model, batch)[batch.rows]


def token_logprobs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    stats: bool = False,
) -> TokenLogprobs:
    """Log-prob [R] float32, in nats, of every scored token of the pack, under the tempered distribution."""
    states = scored_states(model, batch)
    return state_logprobs(model, states, batch.targets, temperature=temperature, entropy=entropy, stats=stats)


def state_logprobs(
    model: PreTrainedModel,
    states: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    stats: bool = False,
) -> TokenLogprobs:
    """The same from `scored_states` [R, D] that are at hand; targets [R] int64."""
    weight, bias = head_of(model)
    softcap, logit_scale = _logit_transform(model)
    return linear_logprob(
        states,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        entropy=entropy,
        stats=stats,
    )


def state_kl(
    model: PreTrainedModel,
    states: Tensor,
    reference: PreTrainedModel,
    reference_states: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenKL:
    """KL(model || reference) [R] float32, in nats, of what either would draw from its `scored_states` [R, D], over the
    whole vocabulary; gradient flows to `model` and `states`. The two are of one architecture."""
    (weight, bias), (reference_weight, reference_bias) = head_of(model), head_of(reference, gathered=True)
    softcap, logit_scale = _logit_transform(model)
    return linear_kl(
        states,
        weight,
        reference_states,
        reference_weight,
        targets=targets,
        bias=bias,
        reference_bias=reference_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        entropy=entropy,
    )


def sequence_scores(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Scores [N] float32 of a reward model, read at the last token of every sequence. The head runs in float32."""
    return read_scores(model, hidden_states(model, batch)[batch.last])


def read_scores(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[N] float32: what the score head reads of last hidden states [N, D]. It runs in float32."""
    return cast(Linear, model.score)(hidden.float())[:, 0]


def token_values(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Values [R] float32 of the states in which the scored tokens were chosen. The head runs in float32."""
    return read_scores(model, hidden_states(model, batch)[batch.rows])


@torch.no_grad()
def own_forward(model: PreTrainedModel) -> Tensor:
    """What `check_packed_forward` expects: of the model's own forward, one sequence at a time."""
    batch, sequences = _probe(model)
    was_training = model.training
    model.eval()
    logits = [model(input_ids=s[None], use_cache=False).logits[0] for s in sequences]
    model.train(was_training)
    if model.get_output_embeddings() is None:
        return torch.cat([x.reshape(-1)[-1:] for x in logits]).float()
    logprobs = torch.cat([x[:-1].float().log_softmax(-1) for x in logits])
    return logprobs.gather(1, batch.targets[:, None])[:, 0]


@torch.no_grad()
def check_packed_forward(model: PreTrainedModel, expected: Tensor | None = None) -> None:
    """Refuses a model whose packed forward is not its own forward, one sequence at a time.

    Catches attention, or a recurrent state, that leaks between sequences (a model that does not go through
    transformers' AttentionInterface), and a head whose logits are transformed in a way that `linear_logprob` was not
    told of. A few tokens, once, at the start. `expected` is `own_forward` before something was done to the backbone;
    None: as it is. Raises ValueError.
    """
    expected = own_forward(model) if expected is None else expected
    batch, sequences = _probe(model)
    was_training = model.training
    model.eval()
    hidden, leaks = _probe_states(model, batch, len(sequences[0]))
    if model.get_output_embeddings() is None:
        packed = read_scores(model, hidden[batch.last])
    else:
        packed = state_logprobs(model, hidden[batch.rows], batch.targets).logprob
    model.train(was_training)
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    error = (packed - expected).abs().max().item()
    if not math.isfinite(error):
        raise ValueError(
            f"{type(model).__name__} of {model.config.name_or_path!r}: its weights give numbers that are not finite"
        )
    if error > tolerance or leaks:
        found = f"differs from the model's own by {error:.2g} nats" if error > tolerance else "mixes sequences"
        raise ValueError(
            f"{type(model).__name__}: the packed forward {found}; "
            "its attention or its head does something fastrlhf does not know, and training would silently mix sequences"
        )


def _probe_states(model: PreTrainedModel, batch: PackedBatch, num_first: int) -> tuple[Tensor, bool]:
    """Last hidden states [T, D], and whether those after the first sequence, of `num_first` tokens, depend on it: then
    a gradient flows there, which in any dtype is exactly 0 where nothing leaks."""
    inputs: list[Tensor] = []

    def as_leaf(module: Module, arguments: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[0]

    with torch.enable_grad(), cast(Module, model.get_input_embeddings()).register_forward_hook(as_leaf):
        hidden = hidden_states(model, batch)
    seen = torch.arange(hidden.numel(), device=hidden.device).cos().view_as(hidden).to(hidden.dtype)
    seen[:num_first] = 0
    (gradient,) = torch.autograd.grad(hidden, inputs, seen)
    return hidden.detach(), bool(gradient[0, :num_first].any())


def _probe(model: PreTrainedModel) -> tuple[PackedBatch, list[Tensor]]:
    """Two sequences, in a pack and one by one."""
    # A sequence classifier looks for its last token that is no padding.
    ids = [i for i in range(model.config.vocab_size) if i != model.config.pad_token_id]
    sequences = [[ids[(5 * i * i + 7 * i + 3 * s) % len(ids)] for i in range(6 + 5 * s)] for s in range(2)]
    batch = pack([Segment(token_ids=s, num_scored=len(s) - 1) for s in sequences], model.device)
    return batch, [torch.tensor(s, device=model.device) for s in sequences]


def _logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, scale) of the architecture's logits: Gemma caps them, Cohere multiplies them, Granite divides them."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale
