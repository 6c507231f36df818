"""The embedded task: a small summarisation problem made by a seeded generator, with a gold judge.

    post        lamp new BOSS angry dog asleep RENT late ... TL;DR:
    ideal       boss angry rent late ...
    reference   boss angry cake sweet                  (a hasty writer: skips, mixes up, adds, stops early)

A post is twelve facts `subject value`; a subject in capitals says that the fact matters. A good summary states the
facts that matter, subjects in the order of `FACTS`. Every subject has values of its own, so that a model of a million
parameters learns within a minute which value belongs to which subject of a post. References come from writers of
varying haste: a model that imitates them is far below the ideal, and even its likeliest summary stops too early.

Why resets can help here (DR-PO, arXiv 2404.08495, section 5): with `chain` above 0 the gold reward pays for an unbroken
run of right facts from the first one on, so an early mistake takes away most of what the later facts are worth. A model
just after SFT seldom gets far without a mistake: what is learnt about late facts is learnt in states that are rare from
the prompt, and that a reset puts it in. `chain=0` takes this away and leaves the task.

Everything is a pure function of (seed, split, index), and no two splits share a post, whatever the seed.
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
"""Subject -> its values. The order of the subjects is the order of a good summary."""

QUESTION = "TL;DR:"
SPLITS = ("train", "validation", "test", "preferences", "preferences_test")
"""SFT and on-policy training use `train`; `preferences_test` holds pairs out to measure a reward model."""

MAX_FACTS = 7
MAX_SUMMARY_TOKENS = 2 * MAX_FACTS + 2
"""A budget for responses: every reference, ideal, chosen and rejected fits, its EOS included."""


class Fact(NamedTuple):
    subject: str
    value: str
    matters: bool


Pair = tuple[str, str]
"""A stated fact: subject and value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTask:
    """The task and its gold judge; `examples`, `ideal` and `gold_reward` are pure functions.

    The rates are those of a writer of haste 1; every rate grows in proportion to haste.
    """

    seed: int = 0
    num_facts: int = 12
    """Facts of a post, 2 tokens each."""
    min_salient: int = 5
    max_salient: int = 7
    """How many facts of a post matter: uniform between the two."""
    omit: float = 0.08
    """Probability that a fact that matters is left out."""
    stray: float = 0.04
    """Probability that a fact that does not matter is stated."""
    wrong: float = 0.06
    """Probability that a stated fact takes another value of its subject."""
    tire: float = 0.15
    """After n stated facts the writer stops with probability `tire * (n - 1)`."""
    chain: float = 0.3
    """The n-th fact of an unbroken run from the first one is worth `chain * (n - 1)` more than 1."""
    length_cost: float = 0.05
    """Reward subtracted per word."""
    min_haste: float = 0.5
    max_haste: float = 1.5
    """Writers of references have a haste uniform between the two; posts do not depend on it."""
    spoiled: float = 0.4
    """Share of candidates in preference pairs that are spoiled on purpose: cut, shuffled, repeated, ..."""
    label_temperature: float = 1.0
    """A pair is labelled by a Bradley-Terry draw: P(a beats b) = sigmoid((gold(a) - gold(b)) / label_temperature).
    0: the better candidate always wins, ties by a fair coin."""
    label_flips: float = 0.0
    """Probability that a label is flipped after that draw."""

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
        """The first `count` examples of a split: prompt and reference; in the preference splits the pair as well."""
        if split not in SPLITS:
            raise ValueError(f"the embedded task has no split {split!r}; choose one of {', '.join(SPLITS)}")
        if split.startswith("preferences") and not any((self.omit, self.stray, self.wrong, self.tire, self.spoiled)):
            raise ValueError("ToyTask: without any noise no two candidates differ; raise omit or spoiled to draw pairs")
        return [self._example(split, index) for index in range(count)]

    def ideal(self, prompt: str) -> str:
        """The facts that matter, in order: the summary with the highest gold reward."""
        return _text(_salient(read_post(prompt)))

    def gold_reward(self, prompt: str, summary: str) -> float:
        """The judge that no trainer may see, in units of one fact.

          distinct facts that matter, rightly stated
        - other stated facts (wrong, beside the point, repeated)
        - half the words that belong to no stated fact
        + chain * run (run - 1) / 2, for the first `run` stated facts that equal the first `run` of the ideal
        - length_cost * words
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
        """Whether two summaries state the same facts, in whatever order and however often: gold equivalence."""
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
        """Probability that the label prefers the first of two candidates, which is better by `margin` facts."""
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
        """The facts that a writer states; never empty, at most MAX_FACTS facts."""
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
        """One side of a pair: a summary by a writer of any haste, spoiled now and then."""
        stated = self._write(facts, rng, haste=rng.uniform(0, 3))
        if rng.random() >= self.spoiled:
            return _text(stated)
        words = rng.choice(_SPOILERS)(facts, stated, rng)
        return " ".join(words[: MAX_SUMMARY_TOKENS - 1])


def read_post(prompt: str) -> list[Fact]:
    """The facts of a prompt; ValueError where it is not a post of this task."""
    *words, question = prompt.split() or [""]
    facts = [Fact(a.lower(), b, a.isupper()) for a, b in zip(words[::2], words[1::2], strict=False)]
    if question != QUESTION or len(words) % 2 or any(fact.value not in FACTS.get(fact.subject, ()) for fact in facts):
        raise ValueError(f"not a post of the embedded task (`subject value ... {QUESTION}`): {prompt!r}")
    return facts


def read_summary(summary: str) -> list[Pair]:
    """The facts that a summary states: each subject directly followed by any value; other words state nothing."""
    words = summary.split()
    return [(a, b) for a, b in pairwise(words) if a in FACTS and b in _VALUES]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word; `<pad>` is 0, `<eos>` is 1, and decoding gives back the text."""
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
    """A Llama of about a million parameters, to be trained from scratch on a CPU: wide rather than deep."""
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
    """Right words in wrong pairs: the values move on by one or more facts."""
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
