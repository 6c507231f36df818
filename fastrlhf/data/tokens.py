"""Tokenises examples: prompt and response separately, after which their ids are concatenated and never tokenised again.

Training, scoring and sampling use the same ids, so no span is ever searched for in re-tokenised text. A response has
the ids that its text has after the prompt (data/encoding.py).

- End tokens: every response ends in one of `end_ids`, unless `max_length` cut it off. If its text ends in none of them,
  the EOS is appended; white space after an end token is dropped. A prompt never gets an end token.
- BOS: a text prompt begins with the tokens that the tokenizer adds to a text. They are not repeated if the text already
  has them. A chat template writes its own BOS.
- Turns: in a response of several turns, only the assistant turns are trained, each including its end token.
- White space at the end of a prompt belongs to the prompt. With `trailing_space` response, it moves to the response if
  it forms one token with the response in their joined text ("TL;DR: " before "cats"), as in TRL.
- Suffixes: text that a template writes after the end of a turn (for ChatML, a newline) is not trained, and after the
  last turn it is left out. With `train_suffix` it is trained, as in TRL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig, parse_template_kwargs
from fastrlhf.data.encoding import first_change, is_lossless, reads_back
from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS
from fastrlhf.data.parallel import in_order
from fastrlhf.data.rendered_ids import Side, encode_rendered
from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.specials import add_ends, end_ids, template_end
from fastrlhf.data.templates import Rendered, Renderer
from fastrlhf.data.token_report import MOST_SHOWN, TokenReport, check_fractions
from fastrlhf.data.token_set import Block, TokenSet
from fastrlhf.data.tokenizer import resolve_chat_template
from fastrlhf.types import Example, Text, TokenizedExample

TruncationMode = Literal["keep_start", "keep_end", "drop"]

CHUNK = 1000
"""Number of examples that are tokenised at a time; only their text pieces and lists of ids are in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExamples:
    examples: TokenSet = field(repr=False)
    report: TokenReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """Settings of tokenisation other than the tokenizer; see `tokenize_examples`."""

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None
    trailing_space: Side = "prompt"

    @classmethod
    def of(cls, config: TrainConfig, day: str) -> TextRules:
        """Returns the rules of a run. `day`: the date for a chat template that asks for one, or an empty text."""
        return cls(
            chat_template_kwargs=parse_template_kwargs(config.chat_template_kwargs),
            day=date.fromisoformat(day) if day else None,
            trailing_space=config.trailing_space,
        )


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
    trailing_space: Side = "prompt",
    max_bad_fraction: float = 1.0,
    max_dropped_fraction: float = 1.0,
    keep_source: bool = False,
    processes: int = 1,
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
        keep_source: let every row hold the example from which it was made.
        processes: maximum number of processes that tokenise; each gets chunks of `CHUNK` examples.

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

    def tokenize_chunk(number: int) -> _Chunk:
        start = number * CHUNK
        chunk = _Chunk(start)
        chunk.add(
            examples[start : start + CHUNK],
            renderer,
            ends,
            fields,
            train_suffix=train_suffix,
            trailing_space=trailing_space,
            fit=lambda prompt, responses, inside: _fit(prompt, responses, max_length, truncation_mode, bos, inside),
            max_length=max_length,
        )
        return chunk

    whole = _Chunk(0)
    blocks = []
    for chunk in in_order(tokenize_chunk, -(-len(examples) // CHUNK), processes):
        whole.count(chunk)
        blocks.append(chunk.block)
    report = TokenReport(
        num_examples=len(examples),
        num_kept=sum(map(len, blocks)),
        max_length=max_length,
        ends=tuple(ends.values()),
        dropped=dict((whole.refused + whole.dropped).most_common()),
        changed=dict(whole.changed.most_common()),
        firsts=whole.firsts,
        dropped_rows=whole.dropped_rows,
        trailing_space=trailing_space,
        **{name: whole.counts[name] for name in _COUNTED},
    )
    check_fractions(report, max_bad_fraction, max_dropped_fraction)
    kept = TokenSet([Block.joined(blocks)])
    return TokenizedExamples(examples=kept.with_sources(examples) if keep_source else kept, report=report)


def encode_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    fields: Sequence[str] = RESPONSES,
    rules: TextRules | None = None,
) -> list[TokenizedExample]:
    """Encodes examples with a tokenizer and its chat template; nothing is truncated, dropped or counted. Raises
    UnusableRow for a row that the template refuses."""
    rules, ends = rules or TextRules(), _ends(tokenizer, None)
    renderer = Renderer(
        tokenizer=tokenizer,
        ends=tuple(ends.values()),
        kwargs=rules.chat_template_kwargs,
        day=rules.day or date.today(),
    )
    rendered = []
    for example in examples:
        try:
            rendered.append((example, renderer.render(example, _responses(example, fields))))
        except UnusableRow as bad:
            raise UnusableRow(bad.reason, f"row {example.row}: {bad}") from None
    encoded = encode_rendered(rendered, tokenizer, ends, trailing_space=rules.trailing_space)
    return [
        _tokenized(
            row.example,
            row.prompt,
            {name: response.ids for name, response in row.responses.items()},
            {name: response.trained for name, response in row.responses.items()},
            True,
        )
        for row in encoded.rows
    ]


class _Chunk:
    """The rows made of some of the examples, and counts of what happened to these."""

    def __init__(self, start: int) -> None:
        """`start`: position of the first example of the chunk."""
        self.start, self.block = start, Block.of([])
        self.counts, self.changed = Counter[str](), Counter[str]()
        self.refused = Counter[str]()
        """Reason -> number of examples that the chat template refuses."""
        self.dropped = Counter[str]()
        """Reason -> number of examples that are dropped after they were encoded."""
        self.firsts: dict[str, str] = {}
        self.dropped_rows: dict[str, list[str]] = {}

    def count(self, later: _Chunk) -> None:
        """Adds the counts of a chunk that comes after all earlier ones."""
        for name in ("counts", "changed", "refused", "dropped"):
            getattr(self, name).update(getattr(later, name))
        self.firsts = {**later.firsts, **self.firsts}
        for reason, rows in later.dropped_rows.items():
            self.dropped_rows[reason] = [*self.dropped_rows.get(reason, ()), *rows][:MOST_SHOWN]

    def _drop(self, drops: Counter[str], reason: str, row: int, detail: str = "") -> None:
        drops[reason] += 1
        told = f"row {row}{detail and f', {detail}'}"
        self.firsts.setdefault(reason, told)
        if drops[reason] <= MOST_SHOWN:
            self.dropped_rows.setdefault(reason, []).append(told)

    def add(
        self,
        examples: Sequence[Example],
        renderer: Renderer,
        ends: Mapping[int, str],
        fields: Sequence[str],
        *,
        train_suffix: bool,
        trailing_space: Side,
        fit: Callable[[list[int], dict[str, list[int]], bool], tuple[str, list[int], dict[str, list[int]]]],
        max_length: int,
    ) -> None:
        """Tokenises the examples of the chunk. `fit` truncates a row, like `_fit`."""
        tokenizer, counts = renderer.tokenizer, self.counts
        rendered: list[tuple[Example, Rendered]] = []
        rendered_places: list[int] = []
        for place, example in enumerate(examples, self.start):
            try:
                rendered.append((example, renderer.render(example, _responses(example, fields))))
                rendered_places.append(place)
            except UnusableRow as bad:
                self._drop(self.refused, bad.reason, example.row, bad.detail)
        encoded = encode_rendered(rendered, tokenizer, ends, train_suffix=train_suffix, trailing_space=trailing_space)
        counts["bos_present"], counts["space_ended"] = encoded.num_with_bos, encoded.num_spaces
        lossless = is_lossless(tokenizer)

        kept: list[TokenizedExample] = []
        places: list[int] = []
        for place, row in zip(rendered_places, encoded.rows, strict=True):
            example, prompt, own = row.example, row.prompt, row.responses
            whole = {name: response.ids for name, response in own.items()}
            inside = any(response.goes_on for response in own.values())
            reason, prompt_ids, ids = fit(prompt, whole, inside)
            trained = {name: response.trained_within(len(ids[name])) for name, response in own.items()}
            if not reason and any(some is not None and not some for some in trained.values()):
                reason = "no_trained_token"
            if reason:
                self._drop(self.dropped, reason, example.row)
                longest = len(prompt) + max(map(len, whole.values()), default=0)
                counts["rows_cut"] += reason == "chosen_equals_rejected" and longest > max_length
                continue
            kept.append(_tokenized(example, prompt_ids, ids, trained, keep_source=False))
            places.append(place)
            for change in sorted(set(row.text.changed.values())):
                self.changed[change] += 1
                self.firsts.setdefault(change, f"row {example.row}")
            cut = {name for name in own if len(ids[name]) < len(whole[name])}
            counts["prompts_cut"] += prompt_ids != prompt
            counts["rows_cut"] += prompt_ids != prompt or bool(cut)
            counts["num_tokens"] += len(prompt_ids) + sum(map(len, ids.values()))
            for name, response in own.items():
                some = trained[name]
                counts["num_trained"] += len(ids[name]) if some is None else len(some)
                counts["responses_cut" if name in cut else "eos_present" if response.had_end else "eos_added"] += 1
                counts["other_end"] += response.had_end and name not in cut and response.end != next(iter(ends))
                if not (lossless or reads_back(prompt, whole[name], response.text, tokenizer)):
                    counts["unlike_text"] += 1
                    if "unlike_text" not in self.firsts:
                        change = first_change(prompt, whole[name], response.text, tokenizer)
                        self.firsts["unlike_text"] = f"row {example.row}, {change}"
        self.block = Block.of(kept, places)


_COUNTED = (
    *("eos_added", "eos_present", "other_end", "bos_present", "responses_cut", "prompts_cut", "rows_cut"),
    *("num_tokens", "num_trained", "unlike_text", "space_ended"),
)


def _responses(example: Example, fields: Sequence[str]) -> dict[str, Text]:
    """Returns the responses of an example by name; the responses of a group are named responses[i]."""
    named = {name: value for name in fields if (value := getattr(example, name)) is not None}
    group = named.pop("responses", ())
    return named | {f"responses[{i}]": value for i, value in enumerate(group)}


def _tokenized(
    example: Example,
    prompt: list[int],
    ids: Mapping[str, list[int]],
    trained: Mapping[str, list[int] | None],
    keep_source: bool,
) -> TokenizedExample:
    group = [response for name, response in ids.items() if name.startswith("responses[")]
    return TokenizedExample(
        prompt=prompt,
        responses=group or None,
        row=example.row,
        source=example if keep_source else None,
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
