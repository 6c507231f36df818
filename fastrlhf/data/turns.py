"""Reads texts and turns from the values of a row: checks them and converts turns to one form without dropping any of
their keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastrlhf.data.rows import UnusableRow
from fastrlhf.types import Example, Message, Text

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Value of ShareGPT's `from` -> role."""

TEMPLATE_KEYS = ("tools", "documents", "chat_template_kwargs")
"""Columns that are passed to the chat template in addition to the turns."""

HH_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def present(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise UnusableRow(f"missing_{name}", f"this row has no {name}")
    return row[name]


def read_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow("wrong_type", f"{name} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRow("wrong_type", f"{name} has half a surrogate pair, which is not a character") from None
    return value


def read_turns(value: object, name: str) -> list[Message]:
    """Reads the turns of a list of {role, content} or of ShareGPT's {from, value}. A single turn is read like a list of
    one turn.

    The content of a turn is text, a list of text parts, which are joined, or null if the turn calls tools. Keys without
    a value are dropped; all others are kept. Raises UnusableRow for anything else, naming the type for images and
    audio.
    """
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRow("wrong_type", f"{name} is {type(value).__name__}, not a list of {{role, content}}")
    return [_turn(turn, name) for turn in turns]


def _turn(turn: Mapping[str, Any], name: str) -> Message:
    if "from" in turn and "role" not in turn:
        turn = _of_sharegpt(turn, name)
    role = read_text(turn.get("role"), f"role of {name}")
    others = {key: value for key, value in turn.items() if value is not None and key not in ("role", "content")}
    if others:
        try:
            json.dumps(others, ensure_ascii=False, default=str, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise UnusableRow(
                "wrong_type", f"{name} contains half a surrogate pair, which is not a character"
            ) from None
        except ValueError:
            raise UnusableRow("wrong_type", f"a turn of {name} holds a number that is not finite") from None
    calls = others.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UnusableRow("wrong_type", f"tool_calls of {name} must be a list of objects")
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    elif content is not None or not others.get("tool_calls"):
        content = read_text(content, f"content of {name}")
    return {"role": role, "content": content, **others}


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return read_text(part, f"content of {name}")
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        reason = f"has_{kind}" if kind in ("image", "image_url", "audio", "input_audio", "video") else "wrong_type"
        raise UnusableRow(reason, f"content of {name} has a part of type {kind!r}; only text is supported")
    return read_text(part.get("text"), f"content of {name}")


def _of_sharegpt(turn: Mapping[str, Any], name: str) -> dict[str, Any]:
    speaker, said = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise UnusableRow("unknown_role", f"{name} has a turn from {speaker!r}; known are {', '.join(ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "weight")}
    if speaker != "function_call":
        return {"role": ROLES[speaker], "content": said, **rest}
    try:
        calls = json.loads(read_text(said, f"value of {name}"))
    except json.JSONDecodeError as error:
        raise UnusableRow("wrong_type", f"a function_call of {name} is not JSON: {error}") from None
    many = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": c} for c in many]}


def read_template_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `tools`, `documents` and `chat_template_kwargs` of a row, parsed if they are JSON text. Raises
    UnusableRow if they have the wrong type."""
    found: dict[str, Any] = {}
    for name in TEMPLATE_KEYS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UnusableRow("wrong_type", f"{name} is not JSON: {error}") from None
        if not value:
            continue
        is_list = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        if not (isinstance(value, dict) if name == "chat_template_kwargs" else is_list):
            kind = "an object" if name == "chat_template_kwargs" else "a list of objects"
            raise UnusableRow("wrong_type", f"{name} must be {kind}, got {type(value).__name__}")
        found[name] = value
    return found


def answer_to(prompt: list[Message], value: object, name: str) -> list[Message]:
    """Returns the turns that answer a prompt; text becomes one turn of the assistant."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": read_text(value, name)}]
    turns = read_turns(value, name)
    # Some datasets repeat the prompt at the start of every response.
    return answer(turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns, name)


def answer(turns: list[Message], name: str) -> list[Message]:
    """Returns the turns of a response, after checking that the first and the last are the assistant's."""
    if not turns or turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise UnusableRow("response_not_by_assistant", f"turns of {name} after the prompt: {roles}")
    return turns


def from_first_answer(example: Example, response: str) -> Example:
    """Moves the part of the prompt from its first assistant turn on to the beginning of the response named
    `response`."""
    prompt, answered = example.prompt, getattr(example, response)
    if isinstance(prompt, str) or answered is None:
        return example
    first = next((i for i, turn in enumerate(prompt) if i and turn["role"] == "assistant"), len(prompt))
    return replace(example, prompt=prompt[:first], **{response: [*prompt[first:], *answered]})


def human_assistant_turns(value: object, name: str) -> list[Message]:
    start, *parts = HH_MARK.split(read_text(value, name).strip())
    if start or not parts:
        raise UnusableRow("not_human_assistant_text", f"{name} does not begin with a 'Human:' turn")
    return [
        {"role": HH_ROLES[mark], "content": content.strip()}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def check_alternate(turns: list[Message], name: str) -> None:
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise UnusableRow("roles_do_not_alternate", f"roles of {name}: {', '.join(roles)}")
    if any(not turn["content"] for turn in turns):
        raise UnusableRow("empty_turn", f"turn {[turn['content'] for turn in turns].index('')} of {name} is empty")


def is_empty(text: Text) -> bool:
    """Returns whether a text contains only white space, or whether all turns of a list contain only white space and no
    tool call."""
    if isinstance(text, str):
        return not text.strip()
    return not any((turn["content"] or "").strip() or turn.get("tool_calls") for turn in text)
