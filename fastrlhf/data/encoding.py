"""Encodes text in its context: a response gets the ids that it has after its prompt, and no special token is added
twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import cast

from tokenizers.decoders import ByteLevel
from tokenizers.pre_tokenizers import ByteLevel as Bytes
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ANCHORS = ("", "\n", "|", "x")
"""Candidates for an anchor. An anchor is put before a text while it is encoded, so that the tokenizer adds no space to
the text. The first candidate that works is used."""

PROBES = ("def f", " a", "\n", "1", "\u00e9", "Yes.", "<b>")


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, specials: bool = False) -> list[list[int]]:
    """Returns the ids of each text, encoded separately; with `specials`, including the tokens that the tokenizer adds
    around a text. A special token that is written in the text becomes one id."""
    if not texts:
        return []
    if _is_plain(tokenizer):  # the same call of the Rust library without offsets and conversions, which take time
        core = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = tokenizer.split_special_tokens
        return [each.ids for each in core.encode_batch_fast(list(texts), add_special_tokens=specials)]
    encoded = tokenizer(list(texts), add_special_tokens=specials, return_attention_mask=False, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer encodes text by the Rust library and its class changes nothing about that."""
    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], int]:
    """Returns the ids of plain-text prompts, including the BOS that the tokenizer adds, and the number of prompts whose
    text already begins with a BOS and gets no second one."""
    encoded, present = encode(texts, tokenizer, specials=True), 0
    bos, text = tokenizer.bos_token_id, str(tokenizer.bos_token)
    for ids, prompt in zip(encoded, texts, strict=True):
        if bos is not None and ids[:2] == [bos, bos] and not prompt.startswith(text * 2):
            del ids[0]
            present += 1
        # Some tokenizers add an EOS to every text; it is removed, because a response follows the prompt.
        if ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(str(tokenizer.eos_token)):
            del ids[-1]
    return encoded, present


def encode_inside(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of texts that follow another text.

    SentencePiece tokenizers put a space before a text that is encoded separately, so that "def" would become " def"
    after a prompt. Each text is therefore encoded after an anchor, whose ids are then removed.
    """
    return _encode_behind(_anchor(tokenizer), texts, tokenizer)


def space_lengths(
    prompts: Sequence[str], responses: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Returns, for every prompt, how many characters at its end become part of the response if both are tokenised as
    one text. TRL cuts at this place, the first id that differs between the prompt and any of the joined texts. The
    number is 0 for prompts that do not end in white space. A prompt without responses is joined with a letter.

    "TL;DR: " before "cats"  ->  1, because " cats" is one token
    """
    which = [i for i, prompt in enumerate(prompts) if prompt[-1:].isspace()]
    alone = dict(zip(which, encode([prompts[i] for i in which], tokenizer), strict=True))
    pairs = [(i, prompts[i] + text) for i in which for text in responses[i] or ("a",)]
    shared = {i: len(ids) for i, ids in alone.items()}
    for (i, _), whole in zip(pairs, encode([text for _, text in pairs], tokenizer), strict=True):
        same = takewhile(lambda both: both[0] == both[1], zip(alone[i], whole, strict=False))
        shared[i] = min(shared[i], sum(1 for _ in same))
    lengths = [0] * len(prompts)
    for i, ids in alone.items():
        end = decode(ids, tokenizer)[len(decode(ids[: shared[i]], tokenizer)) :]
        lengths[i] = len(end) if prompts[i].endswith(end) else 0
    return lengths


def reads_back(prompt: Sequence[int], response: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the ids of the response, decoded after the ids of the prompt, give `text`."""
    return decode([*prompt, *response], tokenizer) == decode(prompt, tokenizer) + text


def first_change(prompt: Sequence[int], response: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describes the first place where the ids of a response decode to another text: a few characters of both texts."""
    decoded = decode([*prompt, *response], tokenizer)[len(decode(prompt, tokenizer)) :]
    at = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(text, decoded, strict=False)))
    own, other = (each[max(0, at - 10) : at + 20] for each in (text, decoded))
    return f"{own!r} becomes {other!r}"


def is_lossless(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether decoding restores every text, whatever text precedes it. This holds for byte-level BPE without a
    normaliser if its vocabulary has all 256 bytes."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    core = tokenizer.backend_tokenizer
    if not isinstance(core.decoder, ByteLevel) or core.normalizer is not None or _anchor(tokenizer) != "":
        return False
    return all(core.token_to_id(byte) is not None for byte in Bytes.alphabet())


def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the first of ANCHORS after which the ids of all PROBES decode to the probes again; "" if there is
    none."""
    before = encode(["Q:\n"], tokenizer)[0]
    reads = partial(reads_back, before, tokenizer=tokenizer)
    for anchor in ANCHORS:
        if all(map(lambda ids, text: reads(ids, text), _encode_behind(anchor, PROBES, tokenizer), PROBES)):
            return anchor
    return ""


def _encode_behind(anchor: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of `texts` after `anchor`. A text whose beginning merges with the anchor into one token is
    encoded without the anchor."""
    if not anchor:
        return encode(texts, tokenizer)
    first = encode([anchor], tokenizer)[0]
    encoded = encode([anchor + text for text in texts], tokenizer)
    joined = [i for i, ids in enumerate(encoded) if ids[: len(first)] != first]
    alone = dict(zip(joined, encode([texts[i] for i in joined], tokenizer), strict=True))
    return [alone[i] if i in alone else ids[len(first) :] for i, ids in enumerate(encoded)]
