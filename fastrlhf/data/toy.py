"""The built-in task of the demo: a small summarisation problem made by a seeded generator, with a gold judge.

    post        lamp new BOSS angry dog asleep RENT late ... TL;DR:
    ideal       boss angry rent late ...
    reference   boss angry cake sweet                  (a hasty writer omits, confuses and adds facts and stops early)

A post consists of twelve facts, each a subject and a value; a subject in capitals marks a fact that matters. A good
summary states the facts that matter, in the order of subjects in `FACTS`. No value belongs to two subjects, so that a
model of a million parameters learns the task within a minute. References come from writers of varying haste: a model
that imitates them stays far below the ideal, and even its most likely summary stops too early.

Resets can help on this task (DR-PO, arXiv 2404.08495, section 5): with `chain` above 0 the gold reward pays for an
unbroken run of right facts from the first one on, so that after an early mistake the later facts are worth little. A
model just after SFT seldom gets far without a mistake. States in which it can learn about late facts are therefore rare
in episodes from the prompt, but a reset starts in them. With `chain=0` resets lose this advantage.

All data are pure functions of (seed, split, index). No two splits share a post, not even under different seeds.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from fastrlhf.types import Example

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

FACTS = {
    "boss": ("angry", "kind", "absent"),
    "rent": ("late", "high", "paid"),
    "dog": ("lost", "hungry", "asleep"),
    "car": ("broken", "fast", "stolen"),
    "aunt": ("sick", "rich", "visiting"),
    "job": ("boring", "new", "gone"),
    "exam": ("tomorrow", "hard", "failed"),
    "friend": ("lying", "loyal", "moving"),
    "phone": ("dead", "ringing", "cracked"),
    "cook": ("rude", "brilliant", "fired"),
    "train": ("delayed", "full", "empty"),
    "roof": ("leaking", "green", "finished"),
    "cake": ("burnt", "sweet", "eaten"),
    "lamp": ("dim", "bright", "antique"),
    "school": ("closed", "strict", "famous"),
    "ticket": ("expired", "cheap", "missing"),
}
"""Subject -> its values. A good summary states the subjects in this order."""

QUESTION = "TL;DR:"
SPLITS = ("train", "validation", "test", "preferences", "preferences_test")
"""Splits of the task. SFT and on-policy training use `train`; `preferences_test` has held-out pairs to evaluate reward
models."""

MAX_FACTS = 7
MAX_SUMMARY_TOKENS = 2 * MAX_FACTS + 2
"""Number of tokens within which every reference, ideal, chosen and rejected response fits, including its EOS."""


class Fact(NamedTuple):
    subject: str
    value: str
    matters: bool


Pair = tuple[str, str]
"""A fact stated in a summary: subject and value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTask:
    """The built-in task and its gold judge. `examples`, `ideal` and `gold_reward` are pure functions.

    Error rates are given for a writer with haste 1 and are proportional to the haste of the writer.
    """

    seed: int = 0
    num_facts: int = 12
    """Number of facts of a post, 2 tokens each."""
    min_salient: int = 5
    max_salient: int = 7
    """The number of facts that matter in a post is uniform between min_salient and max_salient."""
    omit: float = 0.08
    """Probability that a fact that matters is left out."""
    stray: float = 0.04
    """Probability that a fact that does not matter is stated."""
    wrong: float = 0.06
    """Probability that a stated fact has a wrong value of its subject."""
    tire: float = 0.15
    """After n stated facts the writer stops with probability `tire * (n - 1)`."""
    chain: float = 0.3
    """The n-th fact of an unbroken run of right facts from the first one on is worth 1 + `chain * (n - 1)`."""
    length_cost: float = 0.05
    """Reward subtracted per word."""
    min_haste: float = 0.5
    max_haste: float = 1.5
    """The haste of a writer of references is uniform between min_haste and max_haste. Posts do not depend on it."""
    spoiled: float = 0.4
    """Share of candidates in preference pairs that are spoiled on purpose: cut, shuffled, repeated, ..."""
    label_temperature: float = 1.0
    """A pair is labelled by a Bradley-Terry draw: P(a beats b) = sigmoid((gold(a) - gold(b)) / label_temperature). 0:
    the better candidate always wins, and a fair coin decides ties."""
    label_flips: float = 0.0
    """Probability that the label drawn in this way is then flipped."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_salient <= self.max_salient <= min(self.num_facts, MAX_FACTS):
            raise ValueError(
                f"ToyTask: min_salient {self.min_salient} and max_salient {self.max_salient} must be in order and "
                f"in 1..{min(self.num_facts, MAX_FACTS)}"
            )
        if self.num_facts > len(FACTS):
            raise ValueError(f"ToyTask: num_facts must be at most {len(FACTS)}, got {self.num_facts}")
        if not 0 <= self.min_haste <= self.max_haste:
            raise ValueError(
                f"ToyTask: min_haste {self.min_haste} and max_haste {self.max_haste} must be in order, from 0"
            )
        for name in ("omit", "stray", "wrong", "tire", "spoiled", "label_flips"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ToyTask: {name} is a probability, got {getattr(self, name)}")
        if not self.label_temperature >= 0:
            raise ValueError(f"ToyTask: label_temperature must be at least 0, got {self.label_temperature}")

    def examples(self, split: str, count: int) -> list[Example]:
        """Returns the first `count` examples of a split, with prompt and reference and, in the preference splits, a
        pair."""
        if split not in SPLITS:
            raise ValueError(f"the embedded task has no split {split!r}; choose one of {', '.join(SPLITS)}")
        if split.startswith("preferences") and not any((self.omit, self.stray, self.wrong, self.tire, self.spoiled)):
            raise ValueError("ToyTask: without any noise no two candidates differ; raise omit or spoiled to draw pairs")
        return [self._example(split, index) for index in range(count)]

    def ideal(self, prompt: str) -> str:
        """Returns the summary with the highest gold reward: the facts that matter, in order."""
        return _text(_salient(read_post(prompt)))

    def gold_reward(self, prompt: str, summary: str) -> float:
        """Returns the gold reward of a summary, in units of one fact. No trainer has access to it. It is

          the number of distinct facts that matter and are stated with the right value
        - the number of other stated facts (wrong, irrelevant or repeated)
        - half the number of words that belong to no stated fact
        + chain * run (run - 1) / 2, if the first `run` stated facts equal the first `run` facts of the ideal summary
        - length_cost * the number of words
        """
        ideal = _salient(read_post(prompt))
        stated = read_summary(summary)
        num_words = len(summary.split())
        covered = len(set(ideal) & set(stated))
        run = 0
        while run < min(len(ideal), len(stated)) and stated[run] == ideal[run]:
            run += 1
        return (
            covered
            - (len(stated) - covered)
            - 0.5 * (num_words - 2 * len(stated))
            + self.chain * run * (run - 1) / 2
            - self.length_cost * num_words
        )

    def same_meaning(self, prompt: str, first: str, second: str) -> bool:
        """Returns whether two summaries state the same facts, in any order and any number of times (the gold
        equivalence)."""
        return set(read_summary(first)) == set(read_summary(second))

    def _example(self, split: str, index: int) -> Example:
        rng = random.Random(f"{self.seed}/{split}/{index}")
        facts = self._draw_post(rng)
        # The checksum of a post decides its split, so no post is in two splits.
        while zlib.crc32(_prompt(facts).encode()) % len(SPLITS) != SPLITS.index(split):
            facts = self._draw_post(rng)
        prompt = _prompt(facts)
        reference = _text(self._write(facts, rng, haste=rng.uniform(self.min_haste, self.max_haste)))
        if not split.startswith("preferences"):
            return Example(prompt=prompt, reference=reference, row=index)
        first = self._candidate(facts, rng)
        second = first
        while second == first:
            second = self._candidate(facts, rng)
        margin = self.gold_reward(prompt, first) - self.gold_reward(prompt, second)
        chosen, rejected = (first, second) if rng.random() < self._win_prob(margin) else (second, first)
        return Example(prompt=prompt, reference=reference, chosen=chosen, rejected=rejected, row=index)

    def _win_prob(self, margin: float) -> float:
        """Returns the probability that the label prefers the first of two candidates, whose gold reward is higher by
        `margin` facts."""
        if self.label_temperature > 0:
            prob = 0.5 + 0.5 * math.tanh(margin / self.label_temperature / 2)
        else:
            prob = 0.5 if abs(margin) < 1e-9 else float(margin > 0)  # equal gold rewards may differ by rounding
        return prob + self.label_flips * (1 - 2 * prob)

    def _draw_post(self, rng: random.Random) -> list[Fact]:
        subjects = rng.sample(list(FACTS), self.num_facts)
        salient = set(rng.sample(subjects, rng.randint(self.min_salient, self.max_salient)))
        return [Fact(subject, rng.choice(FACTS[subject]), subject in salient) for subject in subjects]

    def _write(self, facts: Sequence[Fact], rng: random.Random, haste: float) -> list[Pair]:
        """Draws the facts that a writer states: at least one and at most MAX_FACTS facts."""
        stated: list[Pair] = []
        for fact in _in_order(facts):
            if rng.random() >= (1 - haste * self.omit if fact.matters else haste * self.stray):
                continue
            value = rng.choice(FACTS[fact.subject]) if rng.random() < haste * self.wrong else fact.value
            stated.append((fact.subject, value))
            if len(stated) == MAX_FACTS or rng.random() < haste * self.tire * (len(stated) - 1):
                break
        return stated or _salient(facts)[:1]

    def _candidate(self, facts: Sequence[Fact], rng: random.Random) -> str:
        """Draws a candidate of a pair: a summary by a writer of random haste, which is spoiled with probability
        `spoiled`."""
        stated = self._write(facts, rng, haste=rng.uniform(0, 3))
        if rng.random() >= self.spoiled:
            return _text(stated)
        words = rng.choice(_SPOILERS)(facts, stated, rng)
        return " ".join(words[: MAX_SUMMARY_TOKENS - 1])


def read_post(prompt: str) -> list[Fact]:
    """Parses the facts of a prompt. Raises ValueError if it is not a post of this task."""
    *words, question = prompt.split() or [""]
    facts = [Fact(a.lower(), b, a.isupper()) for a, b in zip(words[::2], words[1::2], strict=False)]
    if question != QUESTION or len(words) % 2 or any(fact.value not in FACTS.get(fact.subject, ()) for fact in facts):
        raise ValueError(f"not a post of the embedded task (`subject value ... {QUESTION}`): {prompt!r}")
    return facts


def read_summary(summary: str) -> list[Pair]:
    """Parses the facts that a summary states: each is a subject directly followed by any value. Other words state
    nothing."""
    words = summary.split()
    return [(a, b) for a, b in pairwise(words) if a in FACTS and b in _VALUES]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one id per word. `<pad>` is 0, `<eos>` is 1, and decoding restores the text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<eos>", "<unk>", QUESTION, *map(str.upper, FACTS), *FACTS, *sorted(_VALUES))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def toy_model_config() -> LlamaConfig:
    """Returns the configuration of a Llama with about a million parameters, wide rather than deep, which trains from
    scratch on a CPU."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )


def _prompt(facts: Sequence[Fact]) -> str:
    words = [word for f in facts for word in (f.subject.upper() if f.matters else f.subject, f.value)]
    return " ".join([*words, QUESTION])


def _in_order(facts: Sequence[Fact]) -> list[Fact]:
    order = list(FACTS)
    return sorted(facts, key=lambda fact: order.index(fact.subject))


def _salient(facts: Sequence[Fact]) -> list[Pair]:
    return [(fact.subject, fact.value) for fact in _in_order(facts) if fact.matters]


def _text(stated: Sequence[Pair]) -> str:
    return " ".join(_words(stated))


def _words(stated: Sequence[Pair]) -> list[str]:
    return [word for pair in stated for word in pair]


def _cut(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    words = _words(stated)
    return words[: rng.randint(1, len(words))]


def _reorder(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    return _words(rng.sample(stated, len(stated)))


def _repeat_one(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    return _words([rng.choice(stated)] * rng.randint(2, MAX_FACTS))


def _repeat_all(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    return _words(stated + stated[: rng.randint(1, len(stated))])


def _mismatch(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    """Spoils a summary by moving the values on by one or more facts, so that right words are in wrong pairs."""
    shift = rng.randint(1, max(1, len(stated) - 1))
    values = [value for _, value in stated[shift:] + stated[:shift]]
    return _words([(subject, value) for (subject, _), value in zip(stated, values, strict=True)])


def _all_facts(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    return _words([(fact.subject, fact.value) for fact in facts])


def _copy(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    return _prompt(facts).split()


def _jumble(facts: Sequence[Fact], stated: list[Pair], rng: random.Random) -> list[str]:
    words = _words(stated)
    return rng.sample(words, len(words))


_SPOILERS: tuple[Callable[[Sequence[Fact], list[Pair], random.Random], list[str]], ...] = (
    _cut,
    _reorder,
    _repeat_one,
    _repeat_all,
    _mismatch,
    _all_facts,
    _copy,
    _jumble,
)
_VALUES = frozenset(value for values in FACTS.values() for value in values)
