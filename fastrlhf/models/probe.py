"""Probes a model with a few tokens at the start of a run, and checks that the packed forward pass gives the same
results as the model's own. It measures whether sequences can share a pass, and the factor and soft-cap that give logits
from hidden states, so that no list of known model types is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from fastrlhf.data.packing import pack
from fastrlhf.models.attention import packed_attention, runs_alone
from fastrlhf.models.forward import LogitMap, head_input, hidden_states, read_scores, state_logprobs
from fastrlhf.models.sharding import backbone_of, regather, runnable
from fastrlhf.types import PackedBatch, Segment

MASKED = "fastrlhf_masked"
FAR = 1 << 17
"""A distance in tokens beyond every attention window and chunk."""


TYPICAL = 10.0
"""Size of log-probs and scores, in nats, up to which `tolerance` is not scaled."""


def tolerance(dtype: torch.dtype) -> float:
    """Returns by how many nats two computations of a log-prob of at most `TYPICAL` nats may differ."""
    return 1e-4 if dtype == torch.float32 else 0.1


@torch.no_grad()
def own_forward(model: PreTrainedModel) -> Tensor:
    """Computes the log-probs, or scores, of the probe by the model's own forward pass, one sequence at a time.

    Raises ValueError if it fails or gives numbers that are not finite.
    """
    _, sequences = probe_batch(model)
    with _evaluating(model), _named(model, "its own forward fails"):
        logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    if is_scorer(model):
        found = torch.cat([x.reshape(-1)[-1:] for x in logits]).float()
    else:
        pairs = zip(logits, sequences, strict=True)
        found = torch.cat([x[:-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0] for x, ids in pairs])
    if not found.isfinite().all():
        raise ValueError(
            f"{type(model).__name__} of {model.config.name_or_path!r}: its weights give numbers that are not finite"
        )
    return found


def is_scorer(model: PreTrainedModel) -> bool:
    """Returns whether the model has a score head rather than a language-model head. Raises ValueError if it has
    neither."""
    if model.get_output_embeddings() is None and not hasattr(model, "score"):
        raise ValueError(f"{type(model).__name__}: has no head over the vocabulary, so there are no log-probs to train")
    return hasattr(model, "score")


@torch.no_grad()
def find_logit_map(model: PreTrainedModel) -> LogitMap:
    """Finds the LogitMap of a model from its head's weights and its logits on the probe. Raises ValueError if no
    LogitMap fits."""
    _, sequences = probe_batch(model)
    ids = sequences[-1][None]
    head = cast(Linear, model.get_output_embeddings())
    with _evaluating(model), _named(model, "its own forward fails"):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        states = {at_head: read(model, ids) for at_head, read in ((False, _backbone_output), (True, _head_input))}
    limit = 1e-4 if model.dtype == torch.float32 else 0.03
    bias = getattr(head, "bias", None)
    for at_head, hidden in states.items():
        if hidden.shape[-1] != head.weight.shape[1] or logits.shape[-1] != head.weight.shape[0]:
            continue
        raw = hidden.float() @ head.weight.float().T + (0 if bias is None else bias.float())
        for softcap in _softcaps(model.config.get_text_config()):
            if softcap is not None and logits.abs().max() >= softcap:
                continue
            linear = logits if softcap is None else softcap * torch.atanh(logits / softcap)
            fitted = ((raw.double() * linear).sum() / raw.double().square().sum()).item()
            scale = _exact(fitted, model.config.get_text_config(), limit)
            mapped = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
            if (mapped - logits).abs().max() <= limit * logits.abs().max():
                return LogitMap(scale=scale, softcap=softcap, at_head=at_head)
    raise ValueError(
        f"{type(model).__name__}: its logits are not a multiple of the head's weights times hidden states, from "
        "which log-probs are computed here; use another model"
    )


def _backbone_output(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns the output of the backbone, [L, D]; empty if the backbone cannot run separately."""
    try:
        return backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    except (AttributeError, TypeError):
        return torch.empty(0, 0)


def _head_input(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return head_input(model, input_ids=ids, use_cache=False)[0]


def _softcaps(config: PretrainedConfig) -> Iterator[float | None]:
    """Yields candidates for the soft-cap: the value of the usual key, no cap, and every other number with "cap" in its
    name."""
    usual = getattr(config, "final_logit_softcapping", None)
    if usual:
        yield float(usual)
    yield None
    for name, value in _numbers(config):
        if "cap" in name and value > 0 and value != usual:
            yield value


def _exact(fitted: float, config: PretrainedConfig, limit: float) -> float:
    """Returns the exact value that a fitted factor equals up to rounding: 1, a number of the configuration or its
    reciprocal; or the factor itself, if none of these fits."""
    named = [value for name, value in _numbers(config) if "scal" in name or "mult" in name]
    for value in (1.0, *(x for key in named if key for x in (key, 1 / key))):
        if abs(fitted - value) <= limit * abs(value):
            return value
    return fitted


def _numbers(config: PretrainedConfig) -> list[tuple[str, float]]:
    return [(k, float(v)) for k, v in vars(config).items() if isinstance(v, int | float) and not isinstance(v, bool)]


@torch.no_grad()
def check_packed_forward(model: PreTrainedModel, expected: Tensor | None = None) -> None:
    """Raises ValueError if the packed forward pass of a model gives other results than its own forward pass on one
    sequence at a time.

    This finds attention or a recurrent state that leaks between sequences, and logits that differ from `logit_map`.
    `expected`: the result of `own_forward` before the backbone was changed; None: it is computed now.
    """
    try:
        with runnable(model) as trial:
            difference = _difference(trial, own_forward(trial) if expected is None else expected)
    # Raised inside the model family's own code.
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError) as error:
        kind = type(model).__name__
        raise ValueError(f"{kind}: it cannot be trained here ({one_line(error)}); use another model") from error
    if difference:
        raise ValueError(f"{type(model).__name__}: the packed forward {difference}; training would use wrong numbers")


def obstacle_to_packs(model: PreTrainedModel, expected: Tensor) -> str:
    """Returns, as a clause, why the sequences of a pack cannot share a pass; empty if they can."""
    try:
        return _difference(model, expected) or (_hidden_masks(model) if not runs_alone(model) else "")
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"cannot run: {one_line(error)}"


@torch.no_grad()
def _difference(model: PreTrainedModel, expected: Tensor) -> str:
    batch, sequences = probe_batch(model)
    with _evaluating(model):
        hidden, leaks = _probe_states(model, batch, len(sequences[0]))
        if is_scorer(model):
            packed = read_scores(model, hidden[batch.last])
        else:
            packed = state_logprobs(model, hidden[batch.rows], batch.targets).logprob
    error = (packed - expected).abs().max().item()
    if leaks:
        return "mixes sequences"
    if runs_alone(model) and _looks_ahead(model, sequences[-1].tolist()):
        return "has hidden states that depend on later tokens"
    # Rounding grows with the size of the log-probs, which reaches 39 nats in Gemma 3 270M.
    if not error <= tolerance(model.dtype) * max(1.0, expected.abs().max().item() / TYPICAL):
        return f"differs from the model's own by {error:.2g} nats"
    return ""


def _looks_ahead(model: PreTrainedModel, ids: list[int]) -> bool:
    """Returns whether the hidden states of a text depend on the text that follows. The model is then not causal, its
    log-probs are meaningless, and a prompt cannot be shared by responses."""
    whole, start = (hidden_states(model, pack([Segment(token_ids=part)], model.device)) for part in (ids, ids[:5]))
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((whole[:5] - start).abs().max() > limit * start.abs().max())


def _probe_states(model: PreTrainedModel, batch: PackedBatch, num_first: int) -> tuple[Tensor, bool]:
    """Returns the last hidden states [T, D], and whether the states of later sequences depend on the first sequence,
    which has `num_first` tokens. The dependence is tested by a gradient, which is exactly 0 in every dtype if nothing
    leaks."""
    inputs: list[Tensor] = []

    def as_leaf(module: Module, arguments: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1].clone()  # a copy, because some families scale it in place

    embedding = cast(Module, model.get_input_embeddings())
    with torch.enable_grad(), embedding.register_forward_hook(as_leaf):
        hidden = hidden_states(model, batch)
    seen = torch.arange(hidden.numel(), device=hidden.device).cos().view_as(hidden).to(hidden.dtype)
    seen[:num_first] = 0
    if runs_alone(model):  # every sequence has its own call and its own inputs
        torch.autograd.grad(hidden, inputs, seen, allow_unused=True)
        regather(model)
        return hidden.detach(), False
    gradients = torch.autograd.grad(hidden, inputs, seen, allow_unused=True)
    regather(model)
    return hidden.detach(), any(bool(g[0, :num_first].any()) for g in gradients if g is not None)


def check_checkpointing(model: PreTrainedModel, enable: Callable[[], None]) -> None:
    """Turns activation checkpointing on by calling `enable`, and compares gradients before and after. Raises ValueError
    if they differ. Models on the meta device are not run."""
    if model.device.type == "meta":
        return enable()
    with runnable(model) as trial:
        plain = _embedding_gradient(trial)
    with _named(model, "activation_checkpointing", "set it to false"):
        enable()
        with runnable(model) as trial:
            error = (_embedding_gradient(trial) - plain).abs().max().item()
        if not error <= tolerance(model.dtype) * plain.abs().max().item():
            raise ValueError(f"recomputed layers give gradients that differ by {error:.2g}")


def _embedding_gradient(model: PreTrainedModel) -> Tensor:
    """Returns [T, D] float32, the gradients of a fixed function of the probe's hidden states with respect to the
    embeddings."""
    batch, _ = probe_batch(model)
    inputs: list[Tensor] = []

    def as_leaf(module: Module, arguments: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1].clone()  # a copy, because some families scale it in place

    embedding = cast(Module, model.get_input_embeddings())
    with torch.enable_grad(), embedding.register_forward_hook(as_leaf):
        hidden = hidden_states(model, batch)
        weight = torch.arange(hidden.numel(), device=hidden.device).cos().view_as(hidden).to(hidden.dtype)
        gradients = torch.autograd.grad(hidden, inputs, weight, allow_unused=True)
    return torch.cat([g.float().flatten(0, 1) for g in gradients if g is not None])


@torch.no_grad()
def _hidden_masks(model: PreTrainedModel) -> str:
    """Looks for masks of transformers other than the causal mask and the windows that the attention function gets.
    Returns a clause that describes them; empty if there are none.

    Packs have no masks, so such a window or chunk would be lost, and the probe is too short to show it. The model
    therefore runs with masks that transformers makes for tokens far apart, and each mask is compared with the arguments
    of the attention function.
    """
    places = _places(model.config.get_text_config())
    found: list[str] = []

    def mask(*, mask_function: Callable[..., Any], q_length: int, kv_length: int, device: Any, **_: Any) -> Tensor:
        at = torch.tensor(places, device=device)
        visible = mask_function(torch.zeros(1, dtype=torch.int64, device=device), 0, at[:, None], at[None, :])
        return cast(Tensor, visible).expand(1, 1, q_length, kv_length)

    def attend(
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            at = torch.tensor(places, device=query.device)
            distance = at[:, None] - at[None, :]
            told = (distance >= 0) & (distance < (sliding_window or 1 << 62))
            if attention_mask.dtype != torch.bool or not torch.equal(attention_mask[0, 0], told):
                found.append("has attention windows or chunks that are not passed to the attention function")
        return torch.zeros_like(query).transpose(1, 2)[..., : value.shape[-1]].contiguous(), None

    AttentionInterface.register(MASKED, attend)
    AttentionMaskInterface.register(MASKED, mask)
    ids = probe_batch(model)[1][0][0].expand(1, len(places))
    with _evaluating(model), packed_attention(model, MASKED):
        backbone_of(model)(input_ids=ids, use_cache=False)
    return found[0] if found else ""


def _places(config: PretrainedConfig) -> list[int]:
    """Returns positions whose distances lie on both sides of every window and chunk of a configuration."""
    lengths = {int(value) for name, value in _numbers(config) if ("window" in name or "chunk" in name) and value > 1}
    return sorted({0, 1, 2, 3, 7, FAR, FAR + 1} | {x + i for x in lengths for i in (-1, 0, 1, 2) if x < FAR})


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@contextmanager
def _named(model: PreTrainedModel, what: str, fix: str = "take another model") -> Iterator[None]:
    """Context that turns exceptions raised by the code of a model family into a ValueError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{type(model).__name__}: {what} ({one_line(error)}); {fix}") from error


def one_line(error: BaseException, longest: int = 300) -> str:
    """Formats an exception of third-party code on one line."""
    if isinstance(error, UnpicklingError):
        return "a .bin file is a pickle of more than tensors; save the model as safetensors"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= longest else text[:longest] + ' ...'}"


def probe_batch(model: PreTrainedModel) -> tuple[PackedBatch, list[Tensor]]:
    """Returns two short sequences, as a pack and as separate tensors."""
    config = model.config.get_text_config()
    # The padding token is avoided, because a sequence classifier looks for the last token that is not padding.
    ids = [i for i in range(config.vocab_size) if i != getattr(config, "pad_token_id", None)]
    sequences = [[ids[(5 * i * i + 7 * i + 3 * s) % len(ids)] for i in range(6 + 5 * s)] for s in range(2)]
    batch = pack([Segment(token_ids=s, num_scored=len(s) - 1) for s in sequences], model.device)
    return batch, [torch.tensor(s, device=model.device) for s in sequences]
