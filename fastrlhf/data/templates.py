"""Renders conversations by a chat template and splits the text into the prompt and the turns of a response.

The template gets every turn with all its keys, and the row's tools, documents and keyword arguments. The start and end
of a turn are found by rendering the conversation up to this turn; each rendered text must be a prefix of the whole
text. Text is searched for in one case only: to find the end of a turn that the template renders differently if other
turns follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.specials import split_end
from fastrlhf.types import Example, Message

CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Matches a call of `strftime_now`, the function of transformers from which a template gets the current date."""

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Matches the tag {% generation %}, which marks the assistant's text in templates made for training."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that may hold its reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a response: either a turn of the assistant including the end of the turn, or the text between two such
    turns."""

    text: str
    trained: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """An example as text. The text of a response is the concatenation of its pieces and follows the prompt directly."""

    prompt: str
    responses: dict[str, list[Piece]]
    changed: dict[str, str] = field(default_factory=dict)
    """Name of a response -> how the template changed the content of its turns."""

    def moved(self, num: int) -> Rendered:
        """Moves the last `num` characters of the prompt to the beginning of every response."""
        if not num:
            return self
        prompt, space = self.prompt[:-num], self.prompt[-num:]
        responses = {
            name: [replace(first, text=space + first.text), *others]
            for name, (first, *others) in self.responses.items()
        }
        return replace(self, prompt=prompt, responses=responses)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders examples by the chat template of a tokenizer, or by another template."""

    tokenizer: PreTrainedTokenizerBase
    ends: Collection[str]
    """Texts of the tokens that end a turn."""
    template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Template variables for all rows; variables in a row take precedence."""
    day: date = field(default_factory=date.today)
    """The date that a template gets if it asks for the current date."""

    def render(self, example: Example, responses: Mapping[str, Any]) -> Rendered:
        """Renders the prompt of an example and its `responses` (texts, or turns that follow the prompt).

        Raises UnusableRow if the template refuses the turns, if the rendered prompt is not a prefix of the rendered
        conversation, or if the template leaves out tools or tool calls. Raises ValueError if there is no template for a
        conversation.
        """
        if isinstance(example.prompt, str):
            return Rendered(
                prompt=example.prompt, responses={name: [Piece(text=text)] for name, text in responses.items()}
            )
        if not (self.template or self.tokenizer.chat_template):
            raise ValueError(
                f"row {example.row} is a conversation and tokenizer {self.tokenizer.name_or_path} has no chat "
                'template; set chat_template to Jinja text, to a file, or to "hh" for Human/Assistant text'
            )
        prompt = self._text(example, example.prompt, generate=True)
        pieces, changed = {}, {}
        for name, turns in responses.items():
            pieces[name] = self._pieces(example, name, prompt, turns)
            if change := _change(pieces[name], turns):
                changed[name] = change
        _check_tools(example, prompt, pieces, responses)
        return Rendered(prompt=prompt, responses=pieces, changed=changed)

    def turn_ends(self, example: Example, turns: Sequence[Message], *, generate: bool) -> tuple[str, list[int]]:
        """Returns the text that the template renders for `turns`, with the generation prompt if `generate`, and the
        position in it at which each turn ends; -1 if the template renders the turns up to this one differently once
        others follow."""
        whole, ends = self._text(example, turns, generate=generate), []
        for number in range(1, len(turns) + 1):
            try:
                text = self._text(example, turns[:number], generate=False)
            except UnusableRow:  # some templates refuse a conversation without a user
                text = ""
            ends.append(len(text) if text and whole.startswith(text) else -1)
        return whole, ends

    def _pieces(self, example: Example, name: str, prompt: str, turns: Sequence[Message]) -> list[Piece]:
        assert isinstance(example.prompt, list)
        before = [*example.prompt, *turns]
        whole = self._text(example, before, generate=False)
        if not whole.startswith(prompt):
            raise UnusableRow("template_does_not_continue_prompt", f"{name}: {_first_difference(prompt, whole)}")
        spans, at = [], len(prompt)
        for i in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
            number = len(example.prompt) + i
            start = prompt if i == 0 else self._text(example, before[:number], generate=True)
            end = len(whole)
            if i + 1 < len(turns) and whole.startswith(start):
                end = self._end_of_turn(example, whole, start, before[: number + 1])
            if not whole.startswith(start) or end < len(start):
                return self._marked(example, name, before, whole, len(prompt), number)
            spans.append((len(start), end))
        pieces = []
        for start, end in spans:
            pieces += [Piece(text=whole[at:start], trained=False)] if start > at else []
            pieces.append(Piece(text=whole[start:end]))
            at = end
        return pieces

    def _end_of_turn(self, example: Example, whole: str, start: str, turns: Sequence[Message]) -> int:
        """Returns the position in `whole` after the end token of the last of `turns`, an assistant turn; -1 if it is
        unknown. It is found by rendering `turns`. If the template renders the last turn differently once others follow
        (for example without its reasoning), the result is the position after the first end token that follows the
        content of the turn.
        """
        alone = self._text(example, turns, generate=False)
        if alone.startswith(start):
            body, end, _ = split_end(alone[len(start) :], self.ends)
            until = start + body + end if end else alone
            if whole.startswith(until):
                return len(until)
        content = str(turns[-1].get("content") or "").strip()
        said = whole.find(content, len(start))
        if said < 0:
            return -1
        places = {each: whole.find(each, said + len(content)) for each in self.ends}
        ends = [place + len(each) for each, place in places.items() if place >= 0]
        return min(ends, default=-1)

    def _marked(
        self, example: Example, name: str, turns: Sequence[Message], whole: str, start: int, number: int
    ) -> list[Piece]:
        """Splits a response into pieces at the template's generation markers."""
        template, pieces, at = self._template(example), [], start
        if MARKERS.search(template):
            given = {**self.tokenizer.special_tokens_map, **self._given(example)}
            _, spans = cast(Any, render_jinja_template)(
                conversations=[list(turns)], chat_template=template, return_assistant_tokens_mask=True, **given
            )
            for first, end in (span for span in spans[0] if span[0] >= start):
                pieces += [Piece(text=whole[at:first], trained=False)] if first > at else []
                pieces.append(Piece(text=whole[first:end]))
                at = end
        if not pieces:
            raise UnusableRow(
                "template_rewrites_turns",
                f"{name}: turn {number} cannot be found in the whole conversation: the template changes turns once "
                "others follow; use train_on last_assistant, or a chat_template with generation markers",
            )
        return [*pieces[:-1], Piece(text=pieces[-1].text + whole[at:])]

    def _text(self, example: Example, turns: Sequence[Message], *, generate: bool) -> str:
        """Returns the text that the template renders for `turns`. If the template writes "None" for a turn without
        content, the turn is rendered with empty content instead."""
        text = self._apply(example, turns, generate)
        if any(turn.get("content", "") is None for turn in turns):
            empty = [{**turn, "content": "" if turn.get("content") is None else turn["content"]} for turn in turns]
            without = self._apply(example, empty, generate)
            if text != without and text.replace("None", "") == without.replace("None", ""):
                return without
        return text

    def _apply(self, example: Example, turns: Sequence[Message], generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(turns),
                chat_template=self._template(example),
                tokenize=False,
                add_generation_prompt=generate,
                **self._given(example),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UnusableRow("template_refuses", f"the chat template refuses the turns: {error}") from None
        return cast(str, text)

    def _given(self, example: Example) -> dict[str, Any]:
        own = dict(example.template)
        return {**self.kwargs, **own.pop("chat_template_kwargs", {}), **own}

    def _template(self, example: Example) -> str:
        template = self.tokenizer.get_chat_template(self.template, tools=example.template.get("tools"))
        midnight = datetime.combine(self.day, time())
        return CLOCK.sub(lambda found: json.dumps(midnight.strftime(found[2])), template)


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a chat template of the tokenizer asks for the date."""
    return CLOCK.search(str(tokenizer.chat_template or "")) is not None


def _change(pieces: Sequence[Piece], turns: Sequence[Message]) -> str:
    """Returns how the rendered assistant turns differ from their content: text_lost, white_space_trimmed, or "" for no
    change."""
    texts = [piece.text for piece in pieces if piece.trained]
    said = [turn for turn in turns if turn["role"] == "assistant"]
    if len(texts) != len(said):
        return ""
    trimmed = False
    for text, turn in zip(texts, said, strict=True):
        content = str(turn.get("content") or "")
        reasoning = next((str(turn[key]) for key in REASONING if turn.get(key)), "")
        if content.strip() not in text or reasoning.strip() not in text:
            return "text_lost"
        trimmed = trimmed or content not in text
    return "white_space_trimmed" if trimmed else ""


def _check_tools(
    example: Example, prompt: str, responses: Mapping[str, Sequence[Piece]], said: Mapping[str, Sequence[Message]]
) -> None:
    """Raises UnusableRow if tools or documents of the row, or tool calls in its turns, are missing in the text."""
    text = prompt + "".join(piece.text for pieces in responses.values() for piece in pieces)
    turns = [turn for part in (example.prompt, *said.values()) for turn in part if isinstance(turn, dict)]
    calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
    named = {"tools": example.template.get("tools") or (), "tool_calls": calls}
    wanted = [(what, _function_name(each)) for what, many in named.items() for each in many]
    wanted += [("documents", str(each.get("text", ""))) for each in example.template.get("documents") or ()]
    for what, name in wanted:
        if name not in text:
            raise UnusableRow(f"template_ignores_{what}", f"the chat template leaves out {what} {name!r}")


def _function_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _first_difference(prompt: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    start = max(0, at - 20)
    return (
        f"the chat template does not continue the prompt: at character {at} the prompt has "
        f"{prompt[start : at + 40]!r}, the text with the response has {whole[start : at + 40]!r}; "
        "give a chat_template that writes its generation prompt before a finished answer too"
    )
