"""Ready-made reward functions, named in `reward_functions` without a module: exact_match, math_answer, hash_format,
boxed_format, think_format, num_tokens. Each gives one number per response; a format or a right answer is worth 1.

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
    """1 where the response is the answer, after `normalised`."""
    pairs = zip(completions, answer, strict=True)
    return [float(normalised(plain(text)) == normalised(str(right))) for text, right in pairs]


def math_answer(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
    r"""1 when `final_answer` of the response equals that of the column in value, as math-verify compares expressions;
    0 when it differs or the response marks none. None, not judged, when the column holds nothing that math-verify
    can read.

    "1/2" and "\boxed{0.5}" are equal. Raises ValueError when math-verify is not installed.
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
    """1 where the response ends in "#### " and a number, as the answers of GSM8K do."""
    return [float(bool(HASH.search(plain(text)))) for text in completions]


def boxed_format(completions: Sequence[Text], **_: Any) -> list[float]:
    r"""1 when the response holds exactly one \boxed{...} that is not empty."""
    found = [boxed(plain(text)) for text in completions]
    return [float(len(answers) == 1 and bool(answers[0].strip())) for answers in found]


def think_format(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the response is one <think>...</think> and then something else."""
    return [float(bool(THINK.match(plain(text)))) for text in completions]


def num_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Tokens of the response, its EOS included; a weight below 0 rewards short ones."""
    return [float(len(ids)) for ids in completion_ids]


def matches(pattern: str) -> Callable[..., list[float]]:
    """A reward function that gives 1 where a regular expression is found in the response; . matches new lines too."""
    compiled = re.compile(pattern, re.DOTALL)

    def reward(completions: Sequence[Text], **_: Any) -> list[float]:
        return [float(bool(compiled.search(plain(text)))) for text in completions]

    return reward


def plain(completion: Text) -> str:
    """The text of a completion: of a conversation, what its last turn says."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def normalised(text: str) -> str:
    """The text in Unicode compatibility form and lower case, stripped, without a final full stop and with runs of white
    space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()


def final_answer(text: str) -> str | None:
    r"""The marked answer of a response: the last \boxed{...}, otherwise the line after the last ####; None if there is
    neither."""
    if answers := boxed(text):
        return answers[-1]
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0].strip() if mark and after.strip() else None


def boxed(text: str) -> list[str]:
    r"""The content of every \boxed{...} whose braces close, in order."""
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
    """The expression as math-verify parses it, in any notation."""
    return rf"\boxed{{{answer}}}"
