"""Encodes rendered prompts and responses as token ids. A response is encoded piece by piece and gets one end token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fastrlhf.data.encoding import encode, encode_inside, encode_prompts, space_lengths
from fastrlhf.data.specials import split_end
from fastrlhf.data.templates import Piece, Rendered
from fastrlhf.types import Example

Side = Literal["prompt", "response"]

AROUND = 64
"""Number of characters before and after the end of the prompt that are tokenised if only counts are needed."""


@dataclass(slots=True, kw_only=True)
class Response:
    """A tokenised response."""

    ids: list[int]
    trained: list[int] | None
    """Indices of the trained tokens; None: all."""
    end: int
    had_end: bool
    """Whether the text already ended in the end token `end`."""
    goes_on: bool
    """Whether an end token occurs in the middle of a turn."""
    text: str
    """The text to which the ids should decode."""

    def trained_within(self, length: int) -> list[int] | None:
        return None if self.trained is None else [i for i in self.trained if i < length]


@dataclass(slots=True, kw_only=True)
class EncodedRow:
    """An example as ids, before anything is cut."""

    example: Example
    text: Rendered
    prompt: list[int]
    responses: dict[str, Response]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRows:
    rows: list[EncodedRow]
    num_with_bos: int
    """Number of text prompts that already began with a BOS and got no second one."""
    num_spaces: int
    """Number of prompts whose trailing white space would merge with the response if both were tokenised as one text."""


def encode_rendered(
    rendered: Sequence[tuple[Example, Rendered]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Mapping[int, str],
    *,
    train_suffix: bool = False,
    trailing_space: Side = "prompt",
) -> EncodedRows:
    """Encodes prompts and responses as ids. `ends`: id -> text of the tokens that may end a response, the EOS first."""
    spaces = _space_lengths(rendered, tokenizer, whole=trailing_space == "response")
    if trailing_space == "response":
        rendered = [(example, text.moved(num)) for (example, text), num in zip(rendered, spaces, strict=True)]
    prompts, num_with_bos = _encode_prompts(rendered, tokenizer)
    responses = _encode_responses([each.responses for _, each in rendered], tokenizer, ends, train_suffix)
    rows = []
    for (example, text), prompt, own in zip(rendered, prompts, responses, strict=True):
        if not prompt and example.prompt == "":  # a text without a prompt: its first token is not predicted
            prompt, own = _after_first_token(own)
        rows.append(EncodedRow(example=example, text=text, prompt=prompt, responses=own))
    return EncodedRows(rows=rows, num_with_bos=num_with_bos, num_spaces=sum(map(bool, spaces)))


def _space_lengths(
    rendered: Sequence[tuple[Example, Rendered]], tokenizer: PreTrainedTokenizerBase, *, whole: bool
) -> list[int]:
    """Returns `space_lengths` of the rows. Unless `whole`, only the text around the end of the prompt is tokenised,
    which is enough to count the rows with such white space."""
    start, end = (None, None) if whole else (-AROUND, AROUND)
    prompts = [text.prompt[start:] for _, text in rendered]
    firsts = [[pieces[0].text[:end] for pieces in text.responses.values()] for _, text in rendered]
    return space_lengths(prompts, firsts, tokenizer)


def _after_first_token(responses: dict[str, Response]) -> tuple[list[int], dict[str, Response]]:
    """Moves the first token of the response to the prompt, if the example has exactly one response."""
    if len(responses) != 1:
        return [], responses
    ((name, response),) = responses.items()
    return response.ids[:1], {name: replace(response, ids=response.ids[1:])}


def _encode_prompts(
    rendered: Sequence[tuple[Example, Rendered]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], int]:
    """Returns the ids of the prompts, and how many text prompts already began with a BOS. Text from a template already
    has its BOS."""
    plain = [i for i, (example, _) in enumerate(rendered) if isinstance(example.prompt, str)]
    written = [i for i, (example, _) in enumerate(rendered) if not isinstance(example.prompt, str)]
    ids, present = encode_prompts([rendered[i][1].prompt for i in plain], tokenizer)
    found = dict(zip(plain, ids, strict=True))
    found |= zip(written, encode([rendered[i][1].prompt for i in written], tokenizer), strict=True)
    return [found[i] for i in range(len(rendered))], present


def _encode_responses(
    rows: Sequence[Mapping[str, Sequence[Piece]]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Mapping[int, str],
    train_suffix: bool,
) -> list[dict[str, Response]]:
    ids_of = {text: token for token, text in ends.items()}
    parts = [[_parts(pieces, ids_of, train_suffix) for pieces in row.values()] for row in rows]
    flat = [text for row in parts for own in row for text in (*(piece.text for piece in own.pieces), own.suffix)]
    encoded = iter(encode_inside(flat, tokenizer))
    return [
        {name: _assembled(own, encoded, ids_of, next(iter(ends))) for name, own in zip(row, of_row, strict=True)}
        for row, of_row in zip(rows, parts, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    pieces: list[Piece]
    """The pieces of a response, without the end token of the last piece."""
    end: str
    suffix: str


def _parts(pieces: Sequence[Piece], ends: Mapping[str, int], train_suffix: bool) -> _Parts:
    """Splits a response into the texts that are tokenised separately. With `train_suffix`, white space after an
    assistant turn becomes part of that turn."""
    body, end, rest = split_end(pieces[-1].text, ends)
    texts = [*pieces[:-1], Piece(text=body)]
    suffix = ""
    if train_suffix:
        suffix = _leading_space(rest) if end else ""
        for i, piece in enumerate(texts[1:-1], 1):
            if not piece.trained:
                space = _leading_space(piece.text)
                texts[i - 1] = Piece(text=texts[i - 1].text + space)
                texts[i] = Piece(text=piece.text.removeprefix(space), trained=False)
    return _Parts(pieces=texts, end=end, suffix=suffix)


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _assembled(parts: _Parts, encoded: Iterator[list[int]], ends: Mapping[str, int], eos: int) -> Response:
    ids: list[int] = []
    trained: list[int] = []
    body: list[int] = []
    for piece in parts.pieces:
        body = next(encoded)
        if piece.trained:
            trained += range(len(ids), len(ids) + len(body))
        ids += body
    suffix, end = next(encoded), ends.get(parts.end, eos)
    trained += range(len(ids), len(ids) + 1 + len(suffix))
    ids += [end, *suffix]
    text = "".join(piece.text for piece in parts.pieces)
    end_text = parts.end or next(text for text, token in ends.items() if token == eos)
    return Response(
        ids=ids,
        trained=None if len(trained) == len(ids) else trained,
        end=end,
        had_end=bool(parts.end),
        goes_on=not set(ends.values()).isdisjoint(body),
        text=text + end_text + parts.suffix,
    )
