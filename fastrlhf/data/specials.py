"""Special tokens: EOS, padding, and all tokens that may end a response according to the tokenizer, the model or its
chat template.

A response may end in any of `end_ids`: sampling stops at each, and no EOS is added to a text that already ends in one.
The first of `end_ids` is the tokenizer's EOS, which is added to a text that ends in none of them.
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
"""Placeholder for an answer, rendered to find out what a template writes after an answer."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None]:
    """Returns the ids of the EOS and of the padding token. If both are the same token, the padding id is None, because
    the EOS is a token that the model reads and is trained on.

    Raises ValueError if the tokenizer has no EOS.
    """
    eos, pad = require_eos(tokenizer), cast(int | None, tokenizer.pad_token_id)
    return eos, None if pad == eos else pad


class NoEosError(ValueError):
    """Raised for a tokenizer that has no EOS token."""


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise NoEosError(
            f"tokenizer {tokenizer.name_or_path}: it has no EOS token, so no response could end; "
            "set eos_token to one (it is added to the vocabulary if it is missing there)"
        )
    return cast(int, tokenizer.eos_token_id)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that may end a response, the tokenizer's EOS first. Raises ValueError if the tokenizer has no
    EOS."""
    eos = require_eos(tokenizer)
    return (eos, *(token for token in getattr(tokenizer, "more_end_ids", ()) if token != eos))


def add_ends(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], source: str) -> None:
    """Adds `ids` to the `end_ids` of this tokenizer object. An id that is not a special token of the tokenizer could
    end a response in the middle, so it is ignored, with a warning that names `source`."""
    known, special, ids = end_ids(tokenizer), special_tokens(tokenizer), tuple(ids)
    for token in ids:
        if token not in special:
            log.warning("%s: the end token %d is not a special token of the tokenizer, so it is ignored", source, token)
    all_ends = dict.fromkeys((*known, *(token for token in ids if token in special)))
    tokenizer.more_end_ids = tuple(all_ends)[1:]  # pyright: ignore[reportAttributeAccessIssue]


def add_template_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets responses end in the special token by which the tokenizer's chat template ends an answer."""
    if tokenizer.chat_template and (end := template_end(tokenizer)) is not None:
        add_ends(tokenizer, [end], "chat_template")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns id -> text of the special tokens, which never occur in ordinary text."""
    added = tokenizer.added_tokens_decoder
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {token: str(each) for token, each in added.items() if each.special} | dict(named)


def generation_ends(source: str) -> list[int]:
    """Returns the `eos_token_id` in the generation_config.json of a folder or a hub model; empty if there is none."""
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
    """Returns the special token that a chat template writes right after an answer; None if it writes other text there,
    or raises."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False))
    except (TemplateError, ValueError, TypeError):
        return None
    tail = text.rpartition(PROBE)[2].lstrip()
    found = [(len(each), token) for token, each in special_tokens(tokenizer).items() if each and tail.startswith(each)]
    return max(found)[1] if found else None


def split_end(text: str, ends: Collection[str]) -> tuple[str, str, str]:
    """Splits a response that ends in one or several of the texts `ends`, possibly with white space between them, into
    (body, end, rest): end is the first of these texts, and rest is all that follows it. A response that ends in none of
    them is all body.

    "yes<|end|>\\n<eos>"  ->  "yes", "<|end|>", "\\n<eos>"
    """
    body, end, rest = text, "", ""
    while last := max((each for each in ends if body.rstrip().endswith(each)), key=len, default=""):
        before = body.rstrip().removesuffix(last)
        body, end, rest = before, last, body[len(before) + len(last) :] + end + rest
    return body, end, rest
