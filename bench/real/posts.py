"""Made-up posts with summaries, from templates: rows for `make demo-real`, whose text anyone may use.

A post has three facts (who, what, what to do) among sentences that do not matter. A rule judges summaries: it counts
the facts that a summary states and subtracts invented facts and excess words. The rows resemble Reddit TL;DR in their
form only; results on them say nothing about which summaries people prefer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

WHO = ("roommate", "sister", "boss", "neighbour", "cousin", "landlord", "uncle", "coach", "teacher", "colleague")
WHAT = {  # what matters in a sentence -> (the sentence after "My WHO", the short form)
    "bike": ("took my bike for a ride last week and brought it back with a bent wheel", "bent the wheel of my bike"),
    "birthday": ("did not say a word on my birthday although we had talked about it", "forgot my birthday"),
    "piano": ("plays the piano every night until long after two o'clock", "plays the piano all night"),
    "dog": ("lets a huge dog sleep in the kitchen, where I cook", "keeps a dog in the kitchen"),
    "car": ("parks a rusty car in front of my door every single day", "parks a car in front of my door"),
    "secret": ("told everyone the secret that I had shared in confidence", "told everyone my secret"),
    "rent": ("wants a lot more rent from next month on, without any reason", "wants more rent"),
    "wedding": ("invited the whole street to the wedding, only not me", "did not invite me to the wedding"),
    "laptop": ("spilled coffee over my laptop and walked away", "spilled coffee on my laptop"),
    "garden": ("cut down the old tree in my garden while I was away", "cut down a tree in my garden"),
}
ACTION = {
    "money": "ask for money",
    "letter": "write a letter",
    "move": "move out",
    "police": "call the police",
    "apology": "wait for an apology",
    "quit": "quit",
    "gift": "bring a gift",
    "lawyer": "see a lawyer",
}
FILLERS = (
    "It has been raining here for days.", "I am typing this on my phone.", "I had soup for lunch.",
    "This is my first post here.", "Yesterday I watched an old film.", "My shoes are still wet.",
    "I live on the third floor.", "The bus was late again.", "I sleep badly these days.", "It is almost winter.",
)  # fmt: skip
MAX_WORDS = 18
"""Number of words from which on a summary loses 0.1 for each further word."""

_KEYS = (WHO, tuple(WHAT), tuple(ACTION))


def make_rows(count: int, seed: int) -> list[Row]:
    """Makes posts with the columns prompt, reference, chosen, rejected (texts) and facts (three words)."""
    draw = random.Random(seed)
    return [_make_row(draw) for _ in range(count)]


def _make_row(draw: random.Random) -> Row:
    who, what, action = (draw.choice(keys) for keys in _KEYS)
    first, second, third = draw.sample(FILLERS, 3)
    post = f"{first} My {who} {WHAT[what][0]}. {second} {third} I wonder if I should {ACTION[action]} or let it go."
    rejected = draw.choice((f"{first} {second}", _summary(draw, *_with_a_wrong_fact(draw, who, what, action)), third))
    summary = _summary(draw, who, what, action)
    return {
        "prompt": f"POST: {post}\n\nTL;DR:",
        "reference": f" {summary}",
        "chosen": f" {summary}",
        "rejected": f" {rejected}",
        "facts": [who, what, action],
    }


def _summary(draw: random.Random, who: str, what: str, action: str) -> str:
    short, todo = WHAT[what][1], ACTION[action]
    forms = (f"My {who} {short}. Should I {todo}?", f"Should I {todo} because my {who} {short}?")
    return draw.choice((*forms, f"My {who} {short}, and I may {todo}."))


def _with_a_wrong_fact(draw: random.Random, *facts: str) -> list[str]:
    place, wrong = draw.randrange(3), list(facts)
    wrong[place] = draw.choice([key for key in _KEYS[place] if key != facts[place]])
    return wrong


def gold_score(facts: Sequence[str], summary: str) -> float:
    """Returns the number of `facts` that the summary states, minus 0.5 for each stated fact of other posts, minus 0.1
    for each word beyond `MAX_WORDS`. A reference has a score of 3."""
    words = re.findall(r"[a-z']+", summary.lower())
    invented = {key for keys in _KEYS for key in keys if key in words} - {*facts}
    return sum(fact in words for fact in facts) - 0.5 * len(invented) - 0.1 * max(0, len(words) - MAX_WORDS)


def judge(completions: Sequence[str], facts: Sequence[Sequence[str]], **_: Any) -> list[float]:
    """The rule as a reward function: one score per summary; `facts` is a column of the dataset."""
    return [gold_score(own, text) for own, text in zip(facts, completions, strict=True)]
