"""The tokens that begin and end a text, as the tokenizer, the model and its chat template name them.

A response may end in any of `end_ids`: sampling stops at each, and no EOS is added to a text that already ends in one.
The first of them is the tokenizer's EOS, which is added to all other texts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROBE = "Qx7"
"""Placeholder answer, rendered to see what a template writes after an answer."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None]:
    """The ids of EOS and of padding; None for padding that shares its id with EOS, which is a token that is read and
    trained.

    Raises ValueError where there is no EOS.
    """
    eos, pad = require_eos(tokenizer), cast(int | None, tokenizer.pad_token_id)
    return eos, None if pad == eos else pad


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: it has no EOS token, so no response could end; "
            "name one with eos_token (it is added to the vocabulary if it is not there)"
        )
    return cast(int, tokenizer.eos_token_id)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response, the tokenizer's EOS first. Raises ValueError where there is no EOS."""
    eos = require_eos(tokenizer)
    return (eos, *(token for token in getattr(tokenizer, "more_end_ids", ()) if token != eos))


def add_ends(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], source: str) -> None:
    """Lets responses end in `ids` too, for as long as the object lives. An id that is no special token of the tokenizer
    is left out, with a warning that names `source`: it would end responses in the middle."""
    known, special, ids = end_ids(tokenizer), special_tokens(tokenizer), tuple(ids)
    for token in ids:
        if token not in special:
            log.warning(
                "%s: id %d, which it names as an end, is no special token of the tokenizer: not used", source, token
            )
    all_ends = dict.fromkeys((*known, *(token for token in ids if token in special)))
    tokenizer.more_end_ids = tuple(all_ends)[1:]  # pyright: ignore[reportAttributeAccessIssue]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of the special tokens, which never occur in ordinary text."""
    added = tokenizer.added_tokens_decoder
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {token: str(each) for token, each in added.items() if each.special} | dict(named)


def generation_ends(source: str) -> list[int]:
    """`eos_token_id` of the generation_config.json of a folder or a hub model; empty where there is none."""
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "generation_config.json").is_file()):
        return []
    try:
        config = GenerationConfig.from_pretrained(str(path) if path.exists() else source)
    except (OSError, ValueError, HfHubHTTPError):
        return []
    ids: Any = config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, Collection) else [ids]


def template_end(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> int | None:
    """The special token that a chat template writes right after an answer; None if it writes other text, or fails."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False))
    except (TemplateError, ValueError, TypeError):
        return None
    tail = text.rpartition(PROBE)[2].lstrip()
    found = [(len(each), token) for token, each in special_tokens(tokenizer).items() if each and tail.startswith(each)]
    return max(found)[1] if found else None


def split_end(text: str, ends: Collection[str]) -> tuple[str, str, str]:
    """(body, end, rest) of a response that ends in one or several of `ends`, with white space between them: the first
    of these is its end, what follows it is the rest. Without one all is body.

    "yes<|end|>\\n<eos>"  ->  "yes", "<|end|>", "\\n<eos>"
    """
    body, end, rest = text, "", ""
    while last := max((each for each in ends if body.rstrip().endswith(each)), key=len, default=""):
        before = body.rstrip().removesuffix(last)
        body, end, rest = before, last, body[len(before) + len(last) :] + end + rest
    return body, end, rest
