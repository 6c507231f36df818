"""Decodes by transformers' `generate`, with the cache of the model's class or without a cache.

It serves models whose attention or recurrent state does not fit the slots of rollout/kv_cache.py: linear attention,
short convolutions, attention sinks, chunked attention. A logits processor draws the tokens, so that seeds, length
limits and log-probs are the same as with slots. All texts of a call have equal lengths, because padding would enter
recurrent states. Decoding in this way is slower: no new episode takes the place of a finished one, and equal prefixes
are not shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    texts: Tensor,
    num_tokens: int,
    draw: Callable[[Tensor], Tensor],
    done: Callable[[], Tensor],
    *,
    use_cache: bool = True,
) -> None:
    """Continues `texts` [n, L] int64 by at most `num_tokens` tokens each. Without a cache, every step processes the
    whole texts.

    `draw` gets the logits [n, V] float32 after the last tokens and returns the next tokens, [n] int64. After each step,
    `done` returns which texts are finished, [n] bool.
    """
    # No eos_token_id, because the caller decides when a text ends; all settings that would change the logits are off.
    settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, use_cache=use_cache, pad_token_id=0)
    with no_generation_config(model):
        cast(Any, model).generate(
            texts,
            attention_mask=torch.ones_like(texts),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Draw(draw)]),
            stopping_criteria=StoppingCriteriaList([_Done(done)]),
            synced_gpus=False,
        )


@contextmanager
def no_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the generation settings saved with the model, such as a repetition penalty or EOS ids, are
    ignored."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@dataclass(frozen=True)
class _Draw(LogitsProcessor):
    """Sets the logits of all tokens but the drawn one to -inf, so that greedy decoding takes the drawn token."""

    draw: Callable[[Tensor], Tensor]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.draw(scores.float())
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


@dataclass(frozen=True)
class _Done(StoppingCriteria):
    done: Callable[[], Tensor]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.done()
