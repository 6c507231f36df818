"""Tokenises examples: prompt and response separately, after which their ids are concatenated and never tokenised again.

Training, scoring and sampling use the same ids, so no span is ever searched for in re-tokenised text. A response has
the ids that its text has after the prompt (data/encoding.py).

- End tokens: every response ends in one of `end_ids`, unless `max_length` cut it off. If its text ends in none of them,
  the EOS is appended; white space after an end token is dropped. A prompt never gets an end token.
- BOS: a text prompt begins with the tokens that the tokenizer adds to a text. They are not repeated if the text already
  has them. A chat template writes its own BOS.
- Turns: in a response of several turns, only the assistant turns are trained, each including its end token.
- White space at the end of a prompt belongs to the prompt. With `trailing_space` response, it begins the response if it
  forms one token with the response in their joined text ("TL;DR: " before "cats"), as in TRL.
- Suffixes: text that a template writes after the end of a turn (for ChatML, a newline) is not trained, and after the
  last turn it is left out. With `train_suffix` it is trained, as in TRL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from fastrlhf.data.encoding import encode, encode_inside, encode_prompts, is_lossless, reads_back, space_lengths
from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS
from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.specials import add_ends, end_ids, split_end, template_end
from fastrlhf.data.templates import Piece, Rendered, Renderer
from fastrlhf.data.token_report import TokenReport, check_fractions
from fastrlhf.data.tokenizer import resolve_chat_template
from fastrlhf.types import Example, Text, TokenizedExample

TruncationMode = Literal["keep_start", "keep_end", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExamples:
    examples: list[TokenizedExample] = field(repr=False)
    report: TokenReport


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation_mode: TruncationMode = "keep_start",
    fields: Sequence[str] = RESPONSES,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    day: date | None = None,
    train_suffix: bool = False,
    trailing_space: Literal["prompt", "response"] = "prompt",
    max_bad_fraction: float = 1.0,
    max_dropped_fraction: float = 1.0,
) -> TokenizedExamples:
    """Tokenises the prompts and the responses named by `fields`, which may include the groups of `responses`. Other
    responses are left out; labels are kept.

    A conversation is rendered by the chat template: the prompt with the generation prompt, and the response as the text
    that the template writes after it.

    A row whose prompt and longest response together have more than `max_length` tokens is treated as `truncation_mode`
    says:
        keep_start    the end of every response, including its EOS, is cut; the row is dropped if the prompt leaves no
                      room for it
        keep_end      the beginning of the prompt is cut, except a BOS; the row is dropped if a response leaves no room
        drop          the row is dropped

    A row without responses may have `max_length` tokens. A row is also dropped if its prompt or a response has no
    tokens, if a response continues after an end token, if chosen and rejected are the same tokens, or if the chat
    template refuses it or leaves out a part of it.

    Args:
        chat_template: used in place of the tokenizer's template: Jinja text, or "hh".
        chat_template_kwargs: variables passed to the template in addition to the turns; variables in a row take
            precedence.
        day: date for a template that asks for the current date; None: today.
        train_suffix: train the text that the template writes after the end of a turn.
        trailing_space: whether white space at the end of a prompt belongs to the prompt or to the response.
        max_bad_fraction: largest allowed share of rows that the template refuses or changes.
        max_dropped_fraction: largest allowed share of dropped rows.

    Raises:
        ValueError: the tokenizer has no EOS or, for a conversation, no chat template; an argument is invalid; or no
            row, or too small a share of the rows, is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} tokens cannot hold a prompt and a response; give 2 or more")
    if truncation_mode not in ("keep_start", "keep_end", "drop"):
        raise ValueError(f"truncation_mode: {truncation_mode!r} is not one of keep_start, keep_end, drop")
    known = (*RESPONSES, "responses")
    if unknown := set(fields) - set(known):
        raise ValueError(f"fields: {sorted(unknown)} not among {', '.join(known)}")
    template = resolve_chat_template(chat_template, tokenizer) if chat_template else None
    ends, bos = _ends(tokenizer, template), cast(int | None, tokenizer.bos_token_id)
    renderer = Renderer(
        tokenizer=tokenizer,
        ends=tuple(ends.values()),
        template=template,
        kwargs=chat_template_kwargs or {},
        day=day or date.today(),
    )
    fields = [name for name in known if name in fields]

    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    firsts: dict[str, str] = {}

    def drop(reason: str, row: int, detail: str = "") -> None:
        dropped[reason] += 1
        firsts.setdefault(reason, f"row {row}{detail and f', {detail}'}")

    rendered: list[tuple[Example, Rendered]] = []
    for example in examples:
        try:
            rendered.append((example, renderer.render(example, _responses(example, fields))))
        except UnusableRow as bad:
            drop(bad.reason, example.row, bad.detail)
    spaces = _space_lengths(rendered, tokenizer, whole=trailing_space == "response")
    counts["space_ended"] = sum(map(bool, spaces))
    if trailing_space == "response":
        rendered = [(example, text.moved(num)) for (example, text), num in zip(rendered, spaces, strict=True)]
    prompts, counts["bos_present"] = _encode_prompts(rendered, tokenizer)
    responses = _encode_responses([each.responses for _, each in rendered], tokenizer, ends, train_suffix)
    lossless, changed = is_lossless(tokenizer), Counter[str]()

    kept: list[TokenizedExample] = []
    for (example, text), prompt, own in zip(rendered, prompts, responses, strict=True):
        if not prompt and example.prompt == "":  # a whole text, whose first token has no predecessor
            prompt, own = _after_first_token(own)
        whole = {name: response.ids for name, response in own.items()}
        inside = any(response.goes_on for response in own.values())
        reason, prompt_ids, ids = _fit(prompt, whole, max_length, truncation_mode, bos, inside)
        trained = {name: response.trained_within(len(ids[name])) for name, response in own.items()}
        if not reason and any(some is not None and not some for some in trained.values()):
            reason = "no_trained_token"
        if reason:
            drop(reason, example.row)
            continue
        kept.append(_tokenized(example, prompt_ids, ids, trained))
        for change in sorted(set(text.changed.values())):
            changed[change] += 1
            firsts.setdefault(change, f"row {example.row}")
        cut = {name for name in own if len(ids[name]) < len(whole[name])}
        counts["prompts_cut"] += prompt_ids != prompt
        counts["rows_cut"] += prompt_ids != prompt or bool(cut)
        counts["num_tokens"] += len(prompt_ids) + sum(map(len, ids.values()))
        for name, response in own.items():
            some = trained[name]
            counts["num_trained"] += len(ids[name]) if some is None else len(some)
            counts["responses_cut" if name in cut else "eos_present" if response.had_end else "eos_added"] += 1
            counts["other_end"] += response.had_end and name not in cut and response.end != next(iter(ends))
            counts["unlike_text"] += not (lossless or reads_back(prompt, whole[name], response.text, tokenizer))
    report = TokenReport(
        num_examples=len(examples),
        num_kept=len(kept),
        max_length=max_length,
        ends=tuple(ends.values()),
        dropped=dict(dropped.most_common()),
        changed=dict(changed.most_common()),
        firsts=firsts,
        trailing_space=trailing_space,
        **{name: counts[name] for name in _COUNTED},
    )
    check_fractions(report, max_bad_fraction, max_dropped_fraction)
    return TokenizedExamples(examples=kept, report=report)


_COUNTED = (
    *("eos_added", "eos_present", "other_end", "bos_present", "responses_cut", "prompts_cut", "rows_cut"),
    *("num_tokens", "num_trained", "unlike_text", "space_ended"),
)


@dataclass(slots=True, kw_only=True)
class _Response:
    """A tokenised response."""

    ids: list[int]
    trained: list[int] | None
    """Indices of the trained tokens; None: all."""
    end: int
    had_end: bool
    """Whether the text already ended in this end token."""
    goes_on: bool
    """Whether an end token occurs inside a turn, before the end of the turn."""
    text: str
    """The text to which the ids should decode."""

    def trained_within(self, length: int) -> list[int] | None:
        return None if self.trained is None else [i for i in self.trained if i < length]


def _after_first_token(responses: dict[str, _Response]) -> tuple[list[int], dict[str, _Response]]:
    """Moves the first token of the response to the prompt, if the example has exactly one response."""
    if len(responses) != 1:
        return [], responses
    ((name, response),) = responses.items()
    return response.ids[:1], {name: replace(response, ids=response.ids[1:])}


def _responses(example: Example, fields: Sequence[str]) -> dict[str, Text]:
    """Returns the responses of an example by name; the responses of a group are named responses[i]."""
    named = {name: value for name in fields if (value := getattr(example, name)) is not None}
    group = named.pop("responses", ())
    return named | {f"responses[{i}]": value for i, value in enumerate(group)}


def _tokenized(
    example: Example, prompt: list[int], ids: dict[str, list[int]], trained: Mapping[str, list[int] | None]
) -> TokenizedExample:
    group = [response for name, response in ids.items() if name.startswith("responses[")]
    return TokenizedExample(
        prompt=prompt,
        responses=group or None,
        row=example.row,
        trained={name: some for name, some in trained.items() if some is not None} or None,
        **{name: response for name, response in ids.items() if name in RESPONSES},
        **{name: getattr(example, name) for name in (*GROUP_LABELS, *PAIR_LABELS)},
    )


def _ends(tokenizer: PreTrainedTokenizerBase, template: str | None) -> dict[int, str]:
    """Returns id -> text of the tokens that may end a response, the EOS first."""
    if template and (end := template_end(tokenizer, template)) is not None:
        add_ends(tokenizer, [end], "chat_template")
    ids = end_ids(tokenizer)
    return dict(zip(ids, map(str, tokenizer.convert_ids_to_tokens(list(ids))), strict=True))


def _space_lengths(
    rendered: Sequence[tuple[Example, Rendered]], tokenizer: PreTrainedTokenizerBase, *, whole: bool
) -> list[int]:
    """Returns `space_lengths` of the rows. Unless `whole`, only the text around the cut is tokenised, which is enough
    for counting."""
    start, end = (None, None) if whole else (-_AROUND, _AROUND)
    prompts = [text.prompt[start:] for _, text in rendered]
    firsts = [[pieces[0].text[:end] for pieces in text.responses.values()] for _, text in rendered]
    return space_lengths(prompts, firsts, tokenizer)


_AROUND = 64
"""Number of characters on either side of a cut that are tokenised for counting."""


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
) -> list[dict[str, _Response]]:
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
    """The pieces of a response; the last one is without its end token"""
    end: str
    suffix: str


def _parts(pieces: Sequence[Piece], ends: Mapping[str, int], train_suffix: bool) -> _Parts:
    """Returns the texts of a response that are tokenised one by one. With `train_suffix`, white space after a turn of
    the assistant is moved to that turn."""
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


def _assembled(parts: _Parts, encoded: Iterator[list[int]], ends: Mapping[str, int], eos: int) -> _Response:
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
    return _Response(
        ids=ids,
        trained=None if len(trained) == len(ids) else trained,
        end=end,
        had_end=bool(parts.end),
        goes_on=not set(ends.values()).isdisjoint(body),
        text=text + end_text + parts.suffix,
    )


def _fit(
    prompt: list[int],
    responses: dict[str, list[int]],
    max_length: int,
    mode: TruncationMode,
    bos: int | None,
    goes_on: bool,
) -> tuple[str, list[int], dict[str, list[int]]]:
    """Truncates a row to `max_length`. Returns (reason to drop the row, or ""; prompt; responses)."""
    if not prompt:
        return "empty_prompt", prompt, responses
    if any(len(ids) == 1 for ids in responses.values()):
        return "empty_response", prompt, responses
    if goes_on:
        return "eos_inside_response", prompt, responses
    longest = max(map(len, responses.values()), default=0)
    if len(prompt) + longest > max_length:
        if mode == "drop" or (mode == "keep_start" and not responses):
            return "longer_than_max_length", prompt, responses
        if mode == "keep_start":
            if len(prompt) >= max_length:
                return "prompt_fills_max_length", prompt, responses
            responses = {name: ids[: max_length - len(prompt)] for name, ids in responses.items()}
        else:
            head = prompt[:1] if prompt[0] == bos else []
            room = max_length - longest - len(head)
            if room < 1:
                return "response_fills_max_length", prompt, responses
            prompt = head + prompt[-room:]
    if "chosen" in responses and responses["chosen"] == responses.get("rejected"):
        return "chosen_equals_rejected", prompt, responses
    return "", prompt, responses
