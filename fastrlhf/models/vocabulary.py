"""Excludes ids that never occur in text: embeddings often have more rows than the tokenizer has tokens, because they
are padded to a multiple of 64 or more.

On-policy training and sampling use the distribution over the ids of the tokenizer only: other ids are never sampled,
and log-probs, entropies and KLs are exact for the restricted distribution. Offline losses keep the whole vocabulary, as
other trainers do, so that training lowers the probability of the other ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.data.tokenizer import num_token_ids
from fastrlhf.models.sharding import full

_NUM_IDS = "fastrlhf_num_ids"  # attribute of the model with the number; copies of the model have it too


def limit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Restricts the log-probs of the model to the ids up to the tokenizer's largest."""
    num = num_token_ids(tokenizer)
    rows = len(cast(Linear, model.get_output_embeddings()).weight)
    setattr(model, _NUM_IDS, num if num < rows else None)


def num_ids(model: PreTrainedModel) -> int | None:
    """Returns the exclusive upper limit of the ids that may be sampled; None: no limit."""
    return getattr(model, _NUM_IDS, None)


def head_of(model: PreTrainedModel, *, gathered: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns weight [V, D] and bias [V] of the head, restricted to the ids that may be sampled.

    `gathered`: gather the weights first, which a sharded model needs if this rank may hold only a part of them.
    """
    head, num = cast(Linear, model.get_output_embeddings()), num_ids(model)
    weight, bias = full(head.weight) if gathered else head.weight, getattr(head, "bias", None)
    return (weight, bias) if num is None else (weight[:num], None if bias is None else bias[:num])


def write_ends(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Sets the EOS ids that are saved with the model to the end ids used in training: one id, or a list if there are
    several or the model already had a list."""
    text = model.config.get_text_config()  # a composite configuration has no EOS id itself
    for config in (text, model.generation_config):
        if config is not None:
            several = len(ids) > 1 if config is model.generation_config else isinstance(text.eos_token_id, list)
            config.eos_token_id = list(ids) if several else ids[0]
