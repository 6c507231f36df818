"""The known forms of rows. Each converts a row to a prompt and responses, as text or as turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS
from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.turns import (
    TEMPLATE_KEYS,
    answer,
    answer_to,
    check_alternate,
    human_assistant_turns,
    is_empty,
    present,
    read_text,
    read_turns,
)
from fastrlhf.types import Message, Text

RESPONSES = ("chosen", "rejected", "reference")

Fields = dict[str, Any]
"""The fields made from a row: some of prompt, chosen, rejected and reference (Text), and the fields of a group."""


@dataclass(frozen=True, kw_only=True)
class Form:
    name: str
    required: tuple[str, ...]
    """Columns that the dataset must have. The type of the last one shows whether the rows are conversations."""
    convert: Callable[[Mapping[str, Any], bool], Fields]
    """Converts (row, with the forms' names as keys; whether it is a conversation) to fields. Raises UnusableRow."""
    gives: tuple[str, ...] | None = None
    """Names of the responses that the form makes; None: the columns chosen, rejected and reference that the dataset
    has."""

    def provides(self, names: Iterable[str]) -> set[str]:
        given = RESPONSES if self.gives is None else ()
        return {"prompt", *(self.gives or ())}.union({*given, *PAIR_LABELS}.intersection(names))


def _explicit(row: Mapping[str, Any], conversational: bool) -> Fields:
    if not conversational:
        return {name: read_text(row[name], name) for name in ("prompt", *RESPONSES) if row.get(name) is not None}
    prompt = _prompt_turns(present(row, "prompt"))
    fields: Fields = {"prompt": prompt}
    for name in RESPONSES:
        if row.get(name) is not None:
            fields[name] = answer_to(prompt, row[name], name)
    return fields


def _group(row: Mapping[str, Any], conversational: bool) -> Fields:
    prompt, values = present(row, "prompt"), present(row, "responses")
    if not isinstance(values, list) or len(values) < 2:
        raise UnusableRow("wrong_type", "responses must be a list of at least two")
    if conversational:
        prompt = _prompt_turns(prompt)
        responses: list[Text] = [answer_to(prompt, value, f"responses[{i}]") for i, value in enumerate(values)]
    else:
        prompt = read_text(prompt, "prompt")
        responses = [read_text(value, f"responses[{i}]") for i, value in enumerate(values)]
    for i, response in enumerate(responses):
        if is_empty(response):
            raise UnusableRow("empty_response", f"responses[{i}] is empty or white space")
    return {"prompt": prompt, "responses": responses, **{name: row.get(name) for name in GROUP_LABELS}}


def _rated(row: Mapping[str, Any], conversational: bool) -> Fields:
    completions = present(row, "completions")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise UnusableRow("wrong_type", "completions must be a list of {response, overall_score}")
    names = {"responses": "response", "scores": "overall_score"}
    lists = {name: [one.get(key) for one in completions] for name, key in names.items()}
    return _group({"prompt": present(row, "instruction"), **lists}, conversational=False)


def _implicit(row: Mapping[str, Any], conversational: bool) -> Fields:
    read = read_turns if conversational else human_assistant_turns
    turns = {name: read(row[name], name) for name in RESPONSES if row.get(name) is not None}
    if not turns:
        raise UnusableRow("missing_chosen", "this row has no response")
    if not conversational:
        prompts = [conversation[:-1] for conversation in turns.values()]
        if any(prompt != prompts[0] for prompt in prompts):
            raise UnusableRow("prompts_differ", f"{' and '.join(turns)} have different turns before the last one")
        for name, conversation in turns.items():
            check_alternate(conversation, name)
        return {"prompt": prompts[0]} | {name: answer(c[-1:], name) for name, c in turns.items()}
    shared = _common_turns([conversation[:-1] for conversation in turns.values()])
    rest = [conversation[len(shared) :] for conversation in turns.values()]
    if any(not part or part[0]["role"] != "assistant" for part in rest):
        raise UnusableRow("prompts_differ", f"{' and '.join(turns)} differ in a turn that is not the assistant's")
    return {"prompt": shared} | {name: answer(c[len(shared) :], name) for name, c in turns.items()}


def _common_turns(conversations: Sequence[list[Message]]) -> list[Message]:
    first = conversations[0]
    equal = (all(turns[i : i + 1] == first[i : i + 1] for turns in conversations) for i in range(len(first)))
    return first[: sum(takewhile(bool, equal))]


def _common_prefix(row: Mapping[str, Any], conversational: bool) -> Fields:
    """Converts a pair of plain texts: the prompt is their common beginning. A space at the end of the prompt is moved
    to the responses, as in TRL."""
    chosen, rejected = (read_text(present(row, name), name) for name in ("chosen", "rejected"))
    equal = sum(takewhile(bool, (a == b for a, b in zip(chosen, rejected, strict=False))))
    prompt = chosen[:equal].removesuffix(" ")
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _conversation_and_pair(row: Mapping[str, Any], conversational: bool) -> Fields:
    return _explicit({**row, "prompt": present(row, "conversations")}, True)


def _alpaca(row: Mapping[str, Any], conversational: bool) -> Fields:
    """Converts an Alpaca row to a turn of the user, which is instruction and input separated by a line break, and a
    turn of the assistant."""
    asked, given = (read_text(row.get(name) or "", name) for name in ("instruction", "input"))
    text = "\n".join(part for part in (asked, given) if part)
    output = read_text(present(row, "output"), "output")
    return {"prompt": [{"role": "user", "content": text}], "reference": [{"role": "assistant", "content": output}]}


def _whole_text(row: Mapping[str, Any], conversational: bool) -> Fields:
    return {"prompt": "", "reference": read_text(present(row, "text"), "text")}


def _prompt_turns(value: object) -> list[Message]:
    """Returns the turns of a prompt; text becomes one turn of the user."""
    return (
        [{"role": "user", "content": read_text(value, "prompt")}]
        if isinstance(value, str)
        else read_turns(value, "prompt")
    )


def _chat(row: Mapping[str, Any], conversational: bool) -> Fields:
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = read_turns(present(row, name), name)
    return {"prompt": turns[:-1], "reference": answer(turns[-1:], name)}


def _tldr_prompt(post: Mapping[str, Any]) -> str:
    subreddit, title, body = (read_text(present(post, name), name) for name in ("subreddit", "title", "post"))
    if not body.strip():
        raise UnusableRow("empty_prompt", "the post is empty")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def _tldr_response(value: object, name: str) -> str:
    text = read_text(value, name)
    return text if text.startswith(" ") or not text.strip() else f" {text}"


def _tldr_post(row: Mapping[str, Any], conversational: bool) -> Fields:
    return {"prompt": _tldr_prompt(row), "reference": _tldr_response(present(row, "summary"), "summary")}


def _comparison(row: Mapping[str, Any], conversational: bool) -> Fields:
    info, summaries, choice = (present(row, name) for name in ("info", "summaries", "choice"))
    two = isinstance(summaries, list) and [type(summary) for summary in summaries] == [dict, dict]
    if not two or not isinstance(info, dict) or not isinstance(choice, int) or choice not in (0, 1):
        raise UnusableRow("wrong_type", "expected info {...}, summaries [{text}, {text}], and choice 0 or 1")
    texts = [_tldr_response(present(summary, "text"), "text") for summary in summaries]
    return {"prompt": _tldr_prompt(info), "chosen": texts[choice], "rejected": texts[1 - choice]}


PAIRS = Form(name="pairs", required=("prompt", "chosen"), convert=_explicit)
CONVERSATION_PAIRS = Form(name="pairs with the prompt inside", required=("chosen",), convert=_implicit)
PREFIX_PAIRS = Form(
    name="pairs with the prompt as their common beginning",
    required=("chosen", "rejected"),
    convert=_common_prefix,
    gives=("chosen", "rejected"),
)
SHAREGPT_PAIRS = Form(name="ShareGPT pairs", required=("conversations", "chosen"), convert=_conversation_and_pair)
COMPARISONS = Form(
    name="OpenAI comparisons",
    required=("info", "summaries", "choice"),
    convert=_comparison,
    gives=("chosen", "rejected"),
)
POSTS = Form(
    name="TL;DR posts", required=("subreddit", "title", "post", "summary"), convert=_tldr_post, gives=("reference",)
)
DEMONSTRATIONS = Form(name="demonstrations", required=("prompt", "reference"), convert=_explicit)
MESSAGES = Form(name="messages", required=("messages",), convert=_chat, gives=("reference",))
SHAREGPT = Form(name="ShareGPT", required=("conversations",), convert=_chat, gives=("reference",))
ALPACA = Form(name="Alpaca", required=("instruction", "output"), convert=_alpaca, gives=("reference",))
TEXTS = Form(name="whole texts", required=("text",), convert=_whole_text, gives=("reference",))
PROMPTS = Form(name="prompts", required=("prompt",), convert=_explicit)
GROUPS = Form(name="groups", required=("responses", "prompt"), convert=_group, gives=("responses",))
RATED = Form(name="UltraFeedback", required=("instruction", "completions"), convert=_rated, gives=("responses",))
FORMS = (
    *(COMPARISONS, POSTS, PAIRS, DEMONSTRATIONS, SHAREGPT_PAIRS, CONVERSATION_PAIRS, MESSAGES, SHAREGPT, ALPACA),
    *(PROMPTS, GROUPS, RATED, TEXTS),
)
"""The forms in the order in which they are tried. Forms with more columns come first; groups come late, because they
are used only if a command needs groups."""
LABELS = ("responses", *GROUP_LABELS, *PAIR_LABELS)
NAMES = (
    *("prompt", *RESPONSES, *LABELS, "messages", "conversations", "output", "input", "text", "system"),
    *(*TEMPLATE_KEYS, *COMPARISONS.required, *POSTS.required, *RATED.required),
)
