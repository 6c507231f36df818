"""Built-in reward functions, which `reward_functions` names without a module: exact_match, math_answer, hash_format,
boxed_format, think_format, num_tokens. All but num_tokens give 1 for a right answer or a right format and 0 otherwise.

`exact_match` and `math_answer` read the column `answer` of the dataset.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from fastrlhf.types import Text

READY = ("exact_match", "math_answer", "hash_format", "boxed_format", "think_format", "num_tokens")
"""Names that `reward_functions` accepts without a module."""

NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?%?"
HASH = re.compile(rf"####[ \t]*{NUMBER}[ \t]*\.?\s*\Z")
THINK = re.compile(r"\A\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*\S(?:(?!</?think>).)*\Z", re.DOTALL)


def exact_match(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float]:
    """Returns 1 for a response that equals the column `answer` after both are `normalised`, otherwise 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(normalised(plain(text)) == normalised(str(right))) for text, right in pairs]


def math_answer(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
    r"""Returns 1 if math-verify finds that the `final_answer` of the response has the same value as the answer in the
    column `answer`, and 0 if the values differ or the response has no marked answer. Returns None (not judged) if
    math-verify cannot parse the column.

    For example, "1/2" and "\boxed{0.5}" have the same value. Raises ValueError if math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError("math_answer needs math-verify: pip install 'fastrlhf[math]'") from error
    earned: list[float | None] = []
    for text, right in zip(completions, answer, strict=True):
        gold, given = parse(_marked(final_answer(str(right)) or str(right))), final_answer(plain(text))
        earned.append(None if not gold else 0.0 if given is None else float(verify(gold, parse(_marked(given)))))
    return earned


def hash_format(completions: Sequence[Text], **_: Any) -> list[float]:
    """Returns 1 for a response that ends in "#### " and a number, like the answers of GSM8K, otherwise 0."""
    return [float(bool(HASH.search(plain(text)))) for text in completions]


def boxed_format(completions: Sequence[Text], **_: Any) -> list[float]:
    r"""Returns 1 for a response that contains exactly one \boxed{...}, not empty, otherwise 0."""
    found = [boxed(plain(text)) for text in completions]
    return [float(len(answers) == 1 and bool(answers[0].strip())) for answers in found]


def think_format(completions: Sequence[Text], **_: Any) -> list[float]:
    """Returns 1 for a response that is one <think>...</think> followed by other text, otherwise 0."""
    return [float(bool(THINK.match(plain(text)))) for text in completions]


def num_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Returns the number of tokens of each response, including its EOS. With a negative weight, short responses get
    higher rewards."""
    return [float(len(ids)) for ids in completion_ids]


def matches(pattern: str) -> Callable[..., list[float]]:
    """Makes a reward function that gives 1 if a regular expression is found in the response, otherwise 0. A dot also
    matches line breaks."""
    compiled = re.compile(pattern, re.DOTALL)

    def reward(completions: Sequence[Text], **_: Any) -> list[float]:
        return [float(bool(compiled.search(plain(text)))) for text in completions]

    return reward


def plain(completion: Text) -> str:
    """Returns the text of a completion; of a conversation, the text of the last turn."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def normalised(text: str) -> str:
    """Normalises a text for comparison: Unicode compatibility form, lower case, single spaces, no white space at the
    ends and no final full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()


def final_answer(text: str) -> str | None:
    r"""Returns the marked answer of a response: the content of the last \boxed{...}, otherwise the line after the last
    ####; None if it has neither."""
    if answers := boxed(text):
        return answers[-1]
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0].strip() if mark and after.strip() else None


def boxed(text: str) -> list[str]:
    r"""Returns the content of every \boxed{...} with balanced braces, in order."""
    found = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for end in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[start.end() : end])
                break
    return found


def _marked(answer: str) -> str:
    r"""Wraps an expression in \boxed{}, so that math-verify parses it in any notation."""
    return rf"\boxed{{{answer}}}"
