"""The embedded task: a small summarisation problem made by a seeded generator, with a gold judge.

    post        boss angry ! lamp old . rent late ! dog lost ! ... TL;DR:
    ideal       boss angry rent late dog lost ...
    reference   boss angry dog late                     (a hasty writer: skips, mixes up, adds, stops early)

A post is ten facts `subject value mark`; the mark `!` says that the fact matters. A good summary states the facts that
matter, in the order of the post. References come from writers of varying haste, so a model that imitates them is far
below the ideal, and even its most likely summary stops too early.

Why resets can help here (DR-PO, arXiv 2404.08495, section 5): with `chain` above 0 the gold reward pays for an unbroken
run of right facts from the first one on, so an early mistake takes away most of what the later facts are worth. A model
just after SFT seldom gets far without a mistake, and references seldom go far at all: what is learnt about late facts is
learnt in states that are rare from the prompt, and that a reset puts it in. `chain=0` takes this away and leaves the task.

Everything is a pure function of (seed, split, index), and no two splits share a post, whatever the seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fastrlhf.types import Example

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SUBJECTS = tuple(
    [
        "aunt",
        "bank",
        "bike",
        "boss",
        "boat",
        "book",
        "cake",
        "car",
        "cat",
        "chair",
        "class",
        "clock",
        "coat",
        "cook",
        "cousin",
        "desk",
        "doctor",
        "dog",
        "door",
        "exam",
        "fence",
        "friend",
        "garden",
        "guitar",
        "house",
        "job",
        "kitchen",
        "lamp",
        "landlord",
        "lawyer",
        "letter",
        "market",
        "mother",
        "neighbor",
        "oven",
        "phone",
        "piano",
        "plane",
        "rent",
        "roof",
        "school",
        "shop",
        "sister",
        "sofa",
        "teacher",
        "ticket",
        "train",
        "uncle",
        "visa",
        "wedding",
    ]
)
VALUES = tuple(
    [
        "angry",
        "asleep",
        "awake",
        "bored",
        "bright",
        "broken",
        "busy",
        "calm",
        "cheap",
        "clean",
        "closed",
        "cold",
        "dark",
        "dirty",
        "dry",
        "early",
        "empty",
        "famous",
        "fast",
        "free",
        "full",
        "gone",
        "happy",
        "heavy",
        "honest",
        "hungry",
        "jealous",
        "late",
        "lazy",
        "lost",
        "loud",
        "missing",
        "new",
        "noisy",
        "old",
        "open",
        "painted",
        "proud",
        "quiet",
        "ready",
        "rude",
        "sad",
        "safe",
        "sick",
        "slow",
        "sold",
        "stolen",
        "strange",
        "tired",
        "wet",
    ]
)
MARKS = {True: "!", False: "."}
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
    num_facts: int = 10
    """Facts of a post, 3 tokens each."""
    min_salient: int = 5
    max_salient: int = 6
    """How many facts of a post matter: uniform between the two."""
    omit: float = 0.08
    """Probability that a fact that matters is left out."""
    stray: float = 0.06
    """Probability that a fact that does not matter is stated."""
    wrong: float = 0.06
    """Probability that a stated fact takes the value of another fact of the post."""
    tire: float = 0.15
    """After n stated facts the writer stops with probability `tire * (n - 1)`."""
    chain: float = 0.3
    """The n-th fact of an unbroken run from the first one is worth `chain * (n - 1)` more than 1."""
    length_cost: float = 0.05
    """Reward taken per word."""
    spoiled: float = 0.4
    """Share of candidates in preference pairs that are spoiled on purpose: cut, shuffled, repeated, ..."""
    label_temperature: float = 1.0
    """A pair is labelled by a Bradley-Terry draw: P(a beats b) = sigmoid((gold(a) - gold(b)) / label_temperature)."""

    def __post_init__(self) -> None:
        largest = len(VALUES) // len(SPLITS)
        if not 1 <= self.min_salient <= self.max_salient <= min(self.num_facts, MAX_FACTS) or self.num_facts > largest:
            raise ValueError(
                f"ToyTask needs 1 <= min_salient <= max_salient <= num_facts <= {largest} and max_salient <= {MAX_FACTS}, "
                f"got {self.min_salient}, {self.max_salient}, {self.num_facts}"
            )
        for name in ("omit", "stray", "wrong", "tire", "spoiled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ToyTask.{name} is a probability, got {getattr(self, name)}")
        if not self.label_temperature > 0:
            raise ValueError(f"ToyTask.label_temperature must be above 0, got {self.label_temperature}")

    def examples(self, split: str, count: int) -> list[Example]:
        """The first `count` examples of a split: prompt and reference, in the preference splits chosen and rejected too."""
        if split not in SPLITS:
            raise ValueError(f"the embedded task has no split {split!r}; choose one of {', '.join(SPLITS)}")
        return [self._example(split, index) for index in range(count)]

    def ideal(self, prompt: str) -> str:
        """The facts that matter, in the order of the post: the summary with the highest gold reward."""
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

    def _example(self, split: str, index: int) -> Example:
        rng = random.Random(f"{self.seed}/{split}/{index}")
        facts = self._draw_post(rng, SPLITS.index(split))
        prompt = " ".join(f"{fact.subject} {fact.value} {MARKS[fact.matters]}" for fact in facts) + f" {QUESTION}"
        reference = _text(self._write(facts, rng, haste=rng.uniform(0.5, 1.5)))
        if not split.startswith("preferences"):
            return Example(prompt=prompt, reference=reference, row=index)
        first = self._candidate(facts, rng)
        second = first
        while second == first:
            second = self._candidate(facts, rng)
        margin = self.gold_reward(prompt, first) - self.gold_reward(prompt, second)
        first_wins = rng.random() < 1 / (1 + math.exp(-margin / self.label_temperature))
        chosen, rejected = (first, second) if first_wins else (second, first)
        return Example(prompt=prompt, reference=reference, chosen=chosen, rejected=rejected, row=index)

    def _draw_post(self, rng: random.Random, split: int) -> list[Fact]:
        """Subjects and values are distinct within a post; the value numbers sum to `split` modulo the number of splits."""
        subjects = rng.sample(SUBJECTS, self.num_facts)
        values = rng.sample(range(len(VALUES)), self.num_facts - 1)
        residue = (split - sum(values)) % len(SPLITS)
        values.append(rng.choice([v for v in range(residue, len(VALUES), len(SPLITS)) if v not in values]))
        salient = rng.sample(range(self.num_facts), rng.randint(self.min_salient, self.max_salient))
        return [Fact(subjects[i], VALUES[values[i]], i in salient) for i in range(self.num_facts)]

    def _write(self, facts: Sequence[Fact], rng: random.Random, haste: float) -> list[Pair]:
        """What a writer states; never empty, at most MAX_FACTS facts."""
        stated: list[Pair] = []
        for fact in facts:
            if rng.random() >= (1 - haste * self.omit if fact.matters else haste * self.stray):
                continue
            source = rng.choice(facts) if rng.random() < haste * self.wrong else fact
            stated.append((fact.subject, source.value))
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
    facts = [Fact(*words[i : i + 2], words[i + 2] == "!") for i in range(0, len(words) - 2, 3)]
    if question != QUESTION or len(words) % 3 or any(mark not in MARKS.values() for mark in words[2::3]):
        raise ValueError(f"not a post of the embedded task (`subject value mark` ... `{QUESTION}`): {prompt!r}")
    return facts


def read_summary(summary: str) -> list[Pair]:
    """The facts that a summary states: each subject with a value right behind it; other words state nothing."""
    words = summary.split()
    return [(a, b) for a, b in zip(words, words[1:], strict=False) if a in _SUBJECT_SET and b in _VALUE_SET]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word; `<pad>` is 0, `<eos>` is 1, and decoding gives back the text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<eos>", "<unk>", QUESTION, *MARKS.values(), *SUBJECTS, *VALUES)
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
    """A Llama of about a million parameters, to be trained from scratch on a CPU."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(SUBJECTS) + len(VALUES) + len(MARKS) + 4,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _salient(facts: Sequence[Fact]) -> list[Pair]:
    return [(fact.subject, fact.value) for fact in facts if fact.matters]


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
    return [word for fact in facts for word in (fact.subject, fact.value, MARKS[fact.matters])]


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
_SUBJECT_SET = frozenset(SUBJECTS)
_VALUE_SET = frozenset(VALUES)
