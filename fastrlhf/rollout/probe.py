"""Finds the fastest decoder that gives the log-probs of the plain model.

A few fixed tokens are decoded by each decoder, and their log-probs are compared with those of one forward pass without
a cache. A model for which no decoder is right is refused, because it would be trained on wrong samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.attention import runs_alone
from fastrlhf.models.sharding import runnable
from fastrlhf.rollout import generate
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.runtime.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

Decoder = Literal["slots", "own cache", "no cache"]
"""slots: the cache of rollout/kv_cache.py. own cache: the cache of the model's class. no cache: every step processes
the whole text."""

_DECODER = "fastrlhf_decoder"  # attribute of a model with its decoder, which copies of the model have too
SAID: dict[Decoder, str] = {"own cache": "the cache of the model's own class", "no cache": "no cache"}
NUM_GIVEN, NUM_DECODED = 5, 6
"""Number of tokens of the probe that are prefilled, and number of tokens that are decoded."""


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Returns the first decoder that gives the log-probs of the model's own forward pass. It is determined once per
    model.

    Raises ValueError, with the result of each decoder, if none does.
    """
    if not hasattr(model, _DECODER):
        with runnable(model) as trial:
            setattr(model, _DECODER, _choose(trial))
    return getattr(model, _DECODER)


@torch.no_grad()
def _choose(model: PreTrainedModel) -> Decoder:
    texts = _texts(model)
    logits = model(input_ids=texts, use_cache=False).logits
    expected = _logprobs(logits[:, NUM_GIVEN - 1 : -1], texts)
    if not expected.isfinite().all():
        raise ValueError("sampling: the policy's logits are not finite; its weights are broken")
    ways: dict[Decoder, Callable[[PreTrainedModel, Tensor], Tensor]] = {
        "slots": _in_slots,
        "own cache": partial(_by_generate, use_cache=True),
        "no cache": partial(_by_generate, use_cache=False),
    }
    found = []
    if alone := runs_alone(model):
        del ways["slots"]  # the probe is too short to test attention windows and chunks
        found.append(f"slots: its packed forward {alone}")
    for name, way in ways.items():
        try:
            error = _distance(_logprobs(way(model, texts), texts), expected)
        except Exception as failure:  # the code of a model may raise any exception
            if is_out_of_memory(failure):
                raise
            found.append(f"{name}: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}")
            continue
        if error <= _tolerance(model):
            if name != "slots":
                kind = type(model).__name__
                log.warning("%s: sampling uses %s, which is slower (%s)", kind, SAID[name], "; ".join(found))
            return name
        found.append(f"{name}: differs from the plain model by {error:.2g} nats")
    raise ValueError(
        f"{type(model).__name__}: decoding token by token does not give the model's own log-probs "
        f"({'; '.join(found)}), so its samples would be wrong; set engine to vllm, or choose another model"
    )


def _texts(model: PreTrainedModel) -> Tensor:
    """Returns the ids of the two probe texts, [2, NUM_GIVEN + NUM_DECODED] int64."""
    config = model.config.get_text_config()
    ids = [i for i in range(config.vocab_size) if i != getattr(config, "pad_token_id", None)]
    length = NUM_GIVEN + NUM_DECODED
    rows = [[ids[(5 * i * i + 7 * i + 3 * s + 1) % len(ids)] for i in range(length)] for s in range(2)]
    return torch.tensor(rows, device=model.device)


def _in_slots(model: PreTrainedModel, texts: Tensor) -> Tensor:
    """Returns the logits [2, NUM_DECODED, V] from which the decoded tokens would be drawn."""
    cache = SlotCache(len(texts), texts.shape[1])
    logits = [cache.prefill(model, texts[:, :NUM_GIVEN].tolist(), list(range(len(texts))))]
    for t in range(NUM_GIVEN, texts.shape[1] - 1):
        positions = torch.full((len(texts),), t, device=texts.device)
        logits.append(cache.step(model, texts[:, t], positions, cache.capacity))
    return torch.stack(logits, 1)


def _by_generate(model: PreTrainedModel, texts: Tensor, *, use_cache: bool) -> Tensor:
    logits: list[Tensor] = []

    def given(scores: Tensor) -> Tensor:
        logits.append(scores)
        return texts[:, NUM_GIVEN + len(logits) - 1]

    def done() -> Tensor:
        return torch.full((len(texts),), len(logits) == NUM_DECODED, device=texts.device)

    generate.decode(model, texts[:, :NUM_GIVEN], NUM_DECODED, given, done, use_cache=use_cache)
    return torch.stack(logits, 1)


def _logprobs(logits: Tensor, texts: Tensor) -> Tensor:
    """Returns the log-probs [2, NUM_DECODED] float32 of the decoded tokens."""
    return logits.float().log_softmax(-1).gather(2, texts[:, NUM_GIVEN:, None])[:, :, 0]


def _distance(logprobs: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference in nats; infinity if a number is not finite."""
    distance = (logprobs - expected).abs().max().item()
    return distance if math.isfinite(distance) else math.inf


def _tolerance(model: PreTrainedModel) -> float:
    """Returns the tolerance for rounding, in nats; it equals that of the packed forward pass."""
    return 1e-4 if model.dtype == torch.float32 else 0.1
