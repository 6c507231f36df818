"""Compares tokenizers: vocabulary, merges, special tokens and, for conversations, the chat template.

Names, files and padding are ignored. A tokenizer may have special tokens that the tokenizer of the run lacks, because
no text of the run is encoded as one of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastrlhf.config import TrainConfig
from fastrlhf.data.encoding import decode, encode
from fastrlhf.data.specials import NoEosError, special_tokens
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.types import Message

log = logging.getLogger(__name__)

PROBES = (
    "The quick brown fox, 1234567890 times!",
    "  two spaces\n\nand\ttabs \n ",
    "def f(x):\n    return x**2  # don't",
    "\u00c9t\u00e9 \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600 e\u0301",
    'HTTP://Example.com/a_b?c=d&e=%20 <b>x</b> {"k": [1.5e-3]}',
)

_TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATIONS: tuple[tuple[list[Message], dict[str, Any]], ...] = (
    ([{"role": "user", "content": " hi "}], {"add_generation_prompt": True}),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}], {}),
    (
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        {"add_generation_prompt": True},
    ),
    (
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "add", "content": "2"},
            {"role": "assistant", "content": "b"},
        ],
        {"tools": [{"type": "function", "function": _TOOL}]},
    ),
)
"""Conversations by which chat templates are compared, with the arguments of the rendering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    what: Literal["ids", "end", "template"]
    told: str
    """Description of the first difference, for a message."""


def difference(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, conversations: bool
) -> Difference | None:
    """Returns the first difference between `theirs` and `ours`, the tokenizer of the run; None if they encode and
    decode text in the same way.

    Chat templates are compared only for `conversations`, and only if both tokenizers have one.
    """
    if told := _ids(ours, theirs, conversations):
        return Difference(what="ids", told=told)
    if ours.eos_token_id != theirs.eos_token_id:
        told = f"its responses end in {theirs.eos_token!r}, those of the run in {ours.eos_token!r}"
        return Difference(what="end", told=told)
    if conversations and (told := _templates(ours, theirs)):
        return Difference(what="template", told=told)
    return None


def _ids(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, conversations: bool) -> str:
    own, other = ours.get_vocab(), theirs.get_vocab()
    special = {*special_tokens(theirs).values()}
    unlike = [token for token in own if own[token] != other.get(token)]
    unlike += [token for token in other if token not in own and token not in special]
    if unlike:
        token = min(unlike)
        return f"{token!r} has id {other.get(token)} there and {own.get(token)} in the run"
    if isinstance(ours, PreTrainedTokenizerFast) and isinstance(theirs, PreTrainedTokenizerFast):
        if ours.backend_tokenizer is theirs.backend_tokenizer:
            return ""
        (merges, scores), (other_merges, other_scores) = _model(ours), _model(theirs)
        if merges != other_merges:
            both = zip([*merges, None], [*other_merges, None], strict=False)
            first = next(i for i, (a, b) in enumerate(both) if a != b)
            there, here = (" + ".join(all_[first]) if first < len(all_) else "none" for all_ in (other_merges, merges))
            return f"merge {first} is {there} there and {here} in the run"
        if scores != other_scores:
            return "the scores of the vocabulary differ"
    ends = (
        {str(ours.eos_token), str(theirs.eos_token)} if ours.eos_token_id != theirs.eos_token_id else set()
    )  # EOS tokens are compared separately
    specials = (f"a{token}b" for token in special_tokens(ours).values() if token not in ends)
    texts = [*PROBES, *specials, *_written(ours, ends)]
    for text, here, there in zip(texts, encode(texts, ours), encode(texts, theirs), strict=True):
        if here != there:
            return f"{text[:40]!r} becomes {there[:20]} there and {here[:20]} in the run"
    here, there = _before(ours), _before(theirs)
    if here != there and not conversations:  # a chat template writes its own BOS
        return f"a text begins with the ids {there} there and {here} in the run"
    return ""


def _before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that the tokenizer puts before a text."""
    (bare,), (whole,) = encode(["a"], tokenizer), encode(["a"], tokenizer, specials=True)
    return whole[: next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)]


def _model(tokenizer: PreTrainedTokenizerFast) -> tuple[list[tuple[str, ...]], list[float]]:
    """Returns the merges of a BPE tokenizer and the scores of a Unigram tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges") or ()]
    words = model.get("vocab")
    return merges, [score for _, score in words] if isinstance(words, list) else []


def _written(tokenizer: PreTrainedTokenizerBase, without: Collection[object], num: int = 1000) -> list[str]:
    """Returns lines of text, decoded from about `num` tokens spread over the vocabulary."""
    ids = sorted(token for text, token in tokenizer.get_vocab().items() if text not in without)
    chosen = ids[:: max(1, len(ids) // num)]
    return [decode(chosen[i : i + 20], tokenizer) for i in range(0, len(chosen), 20)]


def _templates(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    if not ours.chat_template or not theirs.chat_template or ours.chat_template == theirs.chat_template:
        return ""
    for turns, arguments in CONVERSATIONS:
        here, there = (_rendered(tokenizer, turns, arguments) for tokenizer in (ours, theirs))
        if here != there:
            return f"a conversation is {there!r} there and {here!r} in the run"
    return ""


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], arguments: Mapping[str, Any]) -> str | None:
    try:
        return cast(str, tokenizer.apply_chat_template(list(turns), tokenize=False, **arguments))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None


def require_same_tokenizer(
    field: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    *,
    conversations: bool,
    required: bool = False,
) -> None:
    """Raises ValueError, naming `field` and the fix, if the tokenizer saved with the model `source` differs from the
    tokenizer of the run; if `required`, also if no tokenizer is saved with the model. The run's keys `eos_token` and
    `chat_template`, if given, apply to both tokenizers.
    """
    try:
        theirs = load_tokenizer(
            source,
            eos_token=config.eos_token or None,
            chat_template=config.chat_template or None,
            trust_remote_code=config.trust_remote_code,
        )
    except ValueError as error:
        if not required:
            return
        raise ValueError(
            f"{field}: {error}; save the tokenizer with which the model was trained in the model's folder"
        ) from error
    found = difference(tokenizer, theirs, conversations=conversations)
    if found is None:
        return
    if found.what == "ids":
        fix = "it is read token by token, so both must read the same ids: give a model with the tokenizer of the run"
        raise ValueError(f"{field}: {source!r} has another tokenizer than the run ({found.told}); {fix}")
    key = "eos_token" if found.what == "end" else "chat_template"
    raise ValueError(f"{field}: {found.told}; set {key} to the one that both were trained with")


def own_tokenizer(source: str, config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer saved with a model, with the run's `eos_token` and `chat_template`; None if there is none."""
    try:
        return load_tokenizer(
            source,
            eos_token=config.eos_token or None,
            chat_template=config.chat_template or None,
            trust_remote_code=config.trust_remote_code,
        )
    except NoEosError:
        raise
    except ValueError:
        return None


def judge_tokenizer(
    field: str, source: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, *, conversations: bool
) -> tuple[PreTrainedTokenizerBase, Difference] | None:
    """Returns the tokenizer saved with a judge and its difference from the tokenizer of the run. Returns None if the
    two do not differ, or if no tokenizer is saved with the judge. A judge's tokenizer without an EOS gets the EOS of
    the run."""
    try:
        try:
            theirs = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        except NoEosError:
            eos = str(tokenizer.eos_token)
            theirs = load_tokenizer(source, eos_token=eos, trust_remote_code=config.trust_remote_code)
    except ValueError:
        log.warning("%s: no tokenizer is saved with %s; it is read with the tokenizer of the run", field, source)
        return None
    found = difference(tokenizer, theirs, conversations=conversations)
    return None if found is None else (theirs, found)
