"""Decoding by transformers' `generate`, with the cache of the model's own class or without any.

For models whose attention or recurrent state cannot live in the slots of rollout/kv_cache.py: linear attention, short
convolutions, attention sinks, attention in chunks. A logits processor draws the tokens, so that seeds, budgets and
log-probs are those of the other path. Texts of a call have equal lengths, because padding would enter recurrent states.
This path is slower: no new episode takes the place of one that has ended, and equal prefixes are not shared.
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
    """Continues `texts` [n, L] int64 by at most `num_tokens` tokens each. Without a cache every step reads the whole
    texts again.

    `draw` takes the logits [n, V] float32 after the last tokens and returns the next ones, [n] int64; `done` returns
    after each step which of the n texts are finished, [n] bool.
    """
    # eos_token_id: the caller decides what ends a text. Everything else that would change the logits is at its default.
    settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, use_cache=use_cache, pad_token_id=0)
    with _no_generation_config(model):
        cast(Any, model).generate(
            texts,
            attention_mask=torch.ones_like(texts),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Draw(draw)]),
            stopping_criteria=StoppingCriteriaList([_Done(done)]),
            synced_gpus=False,
        )


@contextmanager
def _no_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the settings saved with the model (a repetition penalty, ids that end a text) are not read."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@dataclass(frozen=True)
class _Draw(LogitsProcessor):
    """Leaves only the token that was drawn, which greedy decoding then takes."""

    draw: Callable[[Tensor], Tensor]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.draw(scores.float())
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


@dataclass(frozen=True)
class _Done(StoppingCriteria):
    done: Callable[[], Tensor]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.done()
