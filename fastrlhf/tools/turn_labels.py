"""Names the turn of a conversation to which each token of a row belongs, for `fastrlhf inspect`.

The end of a turn is found by rendering the conversation up to this turn. A token belongs to the turn in which its text
begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.templates import Renderer
from fastrlhf.types import Example, Message


def turn_labels(
    renderer: Renderer, example: Example, response: Sequence[Message], texts: tuple[Sequence[str], Sequence[str]]
) -> list[str]:
    """Returns the label of the turn of every token of a prompt and its response; empty if the tokens do not decode to
    the text of the chat template, for example because the beginning of the prompt was cut.

    Args:
        response: the turns of the response; empty for a prompt without a response.
        texts: the texts of the tokens of the prompt and of the response.
    """
    assert isinstance(example.prompt, list)
    turns = [*example.prompt, *response]
    try:
        prompt = renderer.turn_ends(example, example.prompt, generate=True)[0]
        whole, ends = renderer.turn_ends(example, turns, generate=not response)
    except UnusableRow:
        return []
    told, said, rest = "".join(texts[0]), "".join(texts[1]), whole[len(prompt) :]
    # The template may write more after the response than its tokens hold, or lack its end token.
    ended = said[: -len(texts[1][-1])] if response else ""
    if told != prompt or not (rest.startswith(said) or rest.startswith(ended)):
        return []
    names = _names(turns, ends, len(whole))
    positions = sorted(names)
    starts = accumulate(map(len, (*texts[0], *texts[1])), initial=0)
    places = (min(bisect_right(positions, start), len(positions) - 1) for start in starts)
    return [names[positions[place]] for place in places][:-1]


def _names(turns: Sequence[Message], ends: Sequence[int], length: int) -> dict[int, str]:
    """Returns position in the text -> label of the turns that end there. Turns with an unknown end share the label of
    the next turn. Text of the template after the last turn, up to `length`, is the generation prompt."""
    names, waiting = {}, list[str]()
    for number, (turn, end) in enumerate(zip(turns, ends, strict=True), 1):
        waiting.append(f"{number} {_describe(turn)}")
        if end >= 0:
            names[end] = f"turn{'s' * (len(waiting) > 1)} {', '.join(waiting)}"
            waiting = []
    rest = f"turn{'s' * (len(waiting) > 1)} {', '.join(waiting)}" if waiting else "generation prompt"
    return {length: rest, **names}


def _describe(turn: Mapping[str, Any]) -> str:
    """Describes a turn: its role, and the names of the functions that it calls.

    {"role": "assistant", "tool_calls": [...]}  ->  "assistant (calls add)"
    """
    calls = [call.get("function", call) for call in turn.get("tool_calls") or ()]
    names = ", ".join(str(call.get("name")) for call in calls if isinstance(call, Mapping))
    return f"{turn['role']} (calls {names})" if names else str(turn["role"])
