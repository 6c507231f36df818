"""Excludes ids that never occur in text: embeddings often have more rows than the tokenizer has tokens, because they
are padded to a multiple of 64 or more, and some tokenizers have no token for ids below their largest.

On-policy training and sampling use the distribution over the ids of the tokenizer only: other ids are never sampled,
and log-probs, entropies and KLs are exact for the restricted distribution. Offline losses keep the whole vocabulary, as
other trainers do, so that training lowers the probability of the other ids. The weights themselves are not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.data.tokenizer import token_ids
from fastrlhf.models.sharding import full

log = logging.getLogger(__name__)

_LIMIT = "fastrlhf_limit"  # attribute of the model with its _Limit; copies of the model have it too


class _Limit(NamedTuple):
    """The ids that may be sampled: those below `num`, or only `ids` if some ids below `num` have no token."""

    num: int
    ids: Tensor | None
    """[A] int64, ascending"""
    places: Tensor | None
    """[num] int64, the index of each id in `ids`; A for an id that is not among them"""


def limit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Restricts the log-probs of the model to the ids for which the tokenizer has a token."""
    known = token_ids(tokenizer)
    num = known[-1] + 1
    limit = _Limit(num, None, None) if num < _num_rows(model) else None
    if len(known) < num:
        ids = torch.tensor(known, device=model.device)
        places = torch.full((num,), len(known), device=model.device)
        limit = _Limit(num, ids, places.index_copy_(0, ids, torch.arange(len(known), device=model.device)))
        holes = sorted(set(range(num)) - set(known))
        first = ", ".join(map(str, holes[:3])) + ", ..." * (len(holes) > 3)
        log.info(
            "the tokenizer has no token for %d ids below its largest (%s); they are never sampled", len(holes), first
        )
    setattr(model, _LIMIT, limit)


def allowed_ids(model: PreTrainedModel) -> Collection[int]:
    """Returns the ids that may be sampled; without a limit these are all rows of the head."""
    limit = _limit(model)
    if limit is None:
        return range(_num_rows(model))
    return range(limit.num) if limit.ids is None else frozenset(limit.ids.tolist())


def is_limited(model: PreTrainedModel) -> bool:
    """Returns whether some rows of the head belong to ids that may not be sampled."""
    return _limit(model) is not None


def allowed_logits(model: PreTrainedModel, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the columns of logits [n, V] of the A ids that may be sampled, [n, A] float32, and these ids, [A] int64,
    or None if the ids are 0 to A - 1."""
    limit = _limit(model)
    if limit is None or limit.ids is None:
        return logits[:, : None if limit is None else limit.num].float(), None
    ids = limit.ids.to(logits.device)
    return logits[:, ids].float(), ids


def check_sampled(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    """Raises ValueError if a user-defined engine has sampled an id that may not be sampled."""
    if wrong := set(tokens) - set(allowed_ids(model)):
        raise ValueError(
            f"engine: it sampled the id {min(wrong)}, for which the tokenizer has no token; let it sample only the ids "
            "of the tokenizer (for vLLM: allowed_token_ids)"
        )


def head_of(model: PreTrainedModel, *, gathered: bool = False, by_id: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns weight [A, D] and bias [A] of the head, restricted to the A ids that may be sampled; `rows_of` gives the
    row of an id.

    `gathered`: gather the weights first, which a sharded model needs if this rank may hold only a part of them.
    `by_id`: the row of an id is the id itself; the rows of ids below the largest that have no token are included.
    """
    head, limit = cast(Linear, model.get_output_embeddings()), _limit(model)
    weight, bias = full(head.weight) if gathered else head.weight, getattr(head, "bias", None)
    if limit is None:
        return weight, bias
    # If ids are missing, this copies the head. A bias of -inf would not exclude an id, because a soft cap makes it
    # finite.
    rows = slice(limit.num) if by_id or limit.ids is None else limit.ids.to(weight.device)
    return weight[rows], None if bias is None else bias[rows]


def rows_of(model: PreTrainedModel, targets: Tensor) -> Tensor:
    """Returns the rows of the head from `head_of` for targets [R] int64. Negative targets, which are ignored, are
    not changed. An id that may not be sampled is mapped to a number beyond the rows."""
    limit = _limit(model)
    if limit is None or limit.places is None:
        return targets
    inside = (targets >= 0) & (targets < limit.num)
    return limit.places.to(targets.device)[targets.where(inside, 0)].where(inside, targets)


def write_ends(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Sets the EOS ids that are saved with the model to the end ids used in training: one id, or a list if there are
    several or the model already had a list."""
    text = model.config.get_text_config()  # a composite configuration has no EOS id itself
    for config in (text, model.generation_config):
        if config is not None:
            several = len(ids) > 1 if config is model.generation_config else isinstance(text.eos_token_id, list)
            config.eos_token_id = list(ids) if several else ids[0]


def save_configs(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and, for a model that can generate, generation_config.json, which holds all its end ids."""
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _limit(model: PreTrainedModel) -> _Limit | None:
    return getattr(model, _LIMIT, None)


def _num_rows(model: PreTrainedModel) -> int:
    return len(cast(Linear, model.get_output_embeddings()).weight)
