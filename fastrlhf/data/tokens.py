"""Examples as token ids: prompt and response tokenised apart, their ids concatenated and never tokenised again.

The same ids are trained on, scored and sampled from, so no span is ever searched for in a re-tokenised text. A response
has the ids that it has behind its prompt (data/encoding.py).

The end rule: every response ends in one of `end_ids`. The EOS is appended where the text ends in none of them (white
space after one is dropped), and the end is missing only where `max_length` cut the response. A prompt never gets one.
The BOS rule: a text prompt begins once with the tokens that the tokenizer puts before a text; a chat template writes
its own BOS.
The rule of turns: in a response of several turns, only the assistant turns are trained, each with its end.
The space rule: white space at the end of a prompt belongs to the prompt. With `trailing_space` response it begins the
response if their joined text has it in one token with the response ("TL;DR: " before "cats"), as in TRL.
The suffix rule: text that a template writes after the end of a turn (the newline of ChatML) is not trained and, after
the last turn, left out. With `train_suffix` it is trained, as in TRL.
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
    """Token ids of prompts and of the responses named by `fields`, the groups of `responses` among them; other
    responses are left out, labels are kept.

    A conversation goes through the chat template: the prompt with the generation prompt, the response as what the
    template writes after it once the response is there.

    A row longer than `max_length` tokens, prompt and longest response together, is treated as a whole:
        keep_start    the ends of its responses are cut, and their EOS with them; dropped if the prompt leaves no room
        keep_end      the beginning of its prompt is cut (a BOS stays); dropped if a response leaves it no room
        drop          dropped
    A row without responses fits up to `max_length` itself. Dropped, too: a prompt or response without tokens, a
    response that goes on after an end, a pair whose chosen and rejected are the same tokens, and a row that the chat
    template refuses or does not write whole.

    Args:
        chat_template: instead of the tokenizer's: Jinja, or "hh".
        chat_template_kwargs: variables passed to the template in addition to the turns; those of a row take precedence.
        day: date given to a template that asks for it; None: today.
        train_suffix: train what the template writes behind the end of a turn.
        trailing_space: where white space at the end of a prompt belongs.
        max_bad_fraction: rows that the template refuses or changes / rows, at most.
        max_dropped_fraction: rows dropped / rows, at most.

    Raises:
        ValueError: no EOS, no chat template for a conversation, a bad argument, no row left, or too few of them.
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
        if not prompt and example.prompt == "":  # a whole text: its first token has nothing to be predicted from
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
    """A response as ids, and how they were made."""

    ids: list[int]
    trained: list[int] | None
    """Indices of the trained tokens; None: all."""
    end: int
    had_end: bool
    """Whether the text already had that end."""
    goes_on: bool
    """Whether an end token occurs inside a turn, before its end."""
    text: str
    """The text to which the ids should decode."""

    def trained_within(self, length: int) -> list[int] | None:
        return None if self.trained is None else [i for i in self.trained if i < length]


def _after_first_token(responses: dict[str, _Response]) -> tuple[list[int], dict[str, _Response]]:
    """Moves the first token into the prompt if the example has a single response."""
    if len(responses) != 1:
        return [], responses
    ((name, response),) = responses.items()
    return response.ids[:1], {name: replace(response, ids=response.ids[1:])}


def _responses(example: Example, fields: Sequence[str]) -> dict[str, Text]:
    """The responses of an example by name, those of a group as responses[i]."""
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
    """Id -> text of the tokens that end a response, the EOS first."""
    if template and (end := template_end(tokenizer, template)) is not None:
        add_ends(tokenizer, [end], "chat_template")
    ids = end_ids(tokenizer)
    return dict(zip(ids, map(str, tokenizer.convert_ids_to_tokens(list(ids))), strict=True))


def _space_lengths(
    rendered: Sequence[tuple[Example, Rendered]], tokenizer: PreTrainedTokenizerBase, *, whole: bool
) -> list[int]:
    """`space_lengths` of the rows; of the texts around the cuts if not of the `whole` texts, which is for counting."""
    start, end = (None, None) if whole else (-_AROUND, _AROUND)
    prompts = [text.prompt[start:] for _, text in rendered]
    firsts = [[pieces[0].text[:end] for pieces in text.responses.values()] for _, text in rendered]
    return space_lengths(prompts, firsts, tokenizer)


_AROUND = 64
"""Number of characters on either side of a cut that are tokenised together to count."""


def _encode_prompts(
    rendered: Sequence[tuple[Example, Rendered]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], int]:
    """Ids, and how many texts began with a BOS; text from a template already has its BOS."""
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
    """The texts of the pieces, the last one without its end"""
    end: str
    suffix: str


def _parts(pieces: Sequence[Piece], ends: Mapping[str, int], train_suffix: bool) -> _Parts:
    """The texts to tokenise, one by one; with `train_suffix` white space at the start of what follows a turn of the
    assistant goes to that turn."""
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
    """(reason to drop or "", prompt, responses within `max_length`)."""
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
