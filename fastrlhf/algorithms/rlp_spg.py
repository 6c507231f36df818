"""RLP-SPG: preference pairs from the most frequent meaning among a policy's answers (Lang et al. 2024, arXiv
2403.19279, section 4.2).

    per prompt: n answers -> groups of equal meaning; confidence = size of the largest group / n
                if >= gamma: chosen = best-scored answer of this group, rejected = random answer outside this group

Equal meaning is bidirectional entailment (Kuhn et al. 2023, arXiv 2302.09664, algorithm 1). Papers and released code
have four incompatible versions of it, and the paper does not say which one it uses; `lax` is ours.

    strict          both directions entail; greedy: in the order of the answers, against the first of each group
    lax             no direction contradicts and not both are neutral; greedy. Ours
    no_contra_2023  no direction contradicts; for all matching i < j, j leaves its group and joins that of i. The
                    released code of Kuhn et al.
    lax_2024        matches as in lax; the first answer without a group takes all later answers that match, also from
                    other groups. The code of Farquhar et al. 2024, the successor of Kuhn et al.
    strict_2024     matches as in strict, groups as in lax_2024; the default of the code of Farquhar et al.

Many prompts are grouped at once: each is a generator of questions, and every wave asks one question of each, in one
call of the judge. The second direction is asked only where the first leaves the answer open.

Choices that the paper leaves open: the first reward model scores; unanimous prompts give no pair; among equally
large groups the one with the best answer wins, then the one that begins first; repeated answers count each time.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from fastrlhf.algorithms.completions import Answers, two_that_differ
from fastrlhf.config import RLPConfig
from fastrlhf.evaluation.equivalence import Comparison, EquivalenceJudge, Relation
from fastrlhf.types import TokenizedExample

log = logging.getLogger(__name__)

PAIR_STREAM, SUBSET_STREAM = 21, 22

FEW = 0.05
"""If a rule accepts a smaller share of the prompts, a warning is logged."""

Question = tuple[int, int]
"""Question: does answer i entail answer j?"""

Same = Callable[[int, int], Generator[Question, Relation, bool]]
"""Generator that asks at most two questions and returns whether answers i and j have the same meaning."""

Grouping = Generator[Question, Relation, list[int] | None]
"""Generator that yields questions, receives relations and returns the group of every answer. It returns None as soon as
no group can become large enough."""


def both_entail(i: int, j: int) -> Generator[Question, Relation, bool]:
    return (yield i, j) == Relation.ENTAILMENT and (yield j, i) == Relation.ENTAILMENT


def no_contradiction(i: int, j: int) -> Generator[Question, Relation, bool]:
    return (yield i, j) != Relation.CONTRADICTION and (yield j, i) != Relation.CONTRADICTION


def no_contradiction_nor_both_neutral(i: int, j: int) -> Generator[Question, Relation, bool]:
    forward = yield i, j
    if forward == Relation.CONTRADICTION:
        return False
    backward = yield j, i
    return backward != Relation.CONTRADICTION and Relation.ENTAILMENT in (forward, backward)


def greedy(same: Same, num: int, needed: int = 0) -> Grouping:
    """Groups answers: each joins the first group whose first member has the same meaning, or begins a new group.
    Returns None as soon as no group can reach `needed` members."""
    firsts: list[int] = []
    groups: list[int] = []
    for item in range(num):
        for group, first in enumerate(firsts):
            if (yield from same(first, item)):
                groups.append(group)
                break
        else:
            groups.append(len(firsts))
            firsts.append(item)
        if max(Counter(groups).values()) + num - item - 1 < needed:
            return None
    return groups


def overwriting(same: Same, num: int, needed: int = 0) -> Grouping:
    """Groups answers: for all i < j with the same meaning, j leaves its earlier group and joins that of i."""
    groups = list(range(num))
    for i in range(num):
        for j in range(i + 1, num):
            if (yield from same(i, j)):
                groups[j] = groups[i]
    return groups


def scanning(same: Same, num: int, needed: int = 0) -> Grouping:
    """Groups answers: the first answer without a group begins one and takes all later answers with the same meaning."""
    groups, count = [-1] * num, 0
    for i in range(num):
        if groups[i] >= 0:
            continue
        groups[i] = count
        for j in range(i + 1, num):
            if (yield from same(i, j)):
                groups[j] = count
        count += 1
    return groups


RULES: dict[str, Callable[[int, int], Grouping]] = {
    "strict": partial(greedy, both_entail),
    "lax": partial(greedy, no_contradiction_nor_both_neutral),
    "no_contra_2023": partial(overwriting, no_contradiction),
    "lax_2024": partial(scanning, no_contradiction_nor_both_neutral),
    "strict_2024": partial(scanning, both_entail),
}
"""Value of `clustering` -> function that starts the grouping, given the number of answers and the number of members
that the largest group must reach. The rules of 2023 and 2024 never stop early."""


def num_needed(min_confidence: float, num: int) -> int:
    """Returns the number of members that the largest group needs for the prompt to give a pair."""
    return math.ceil(min_confidence * num - 1e-9)


def group_answers(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], judge: EquivalenceJudge, rule: str, needed: int = 0
) -> list[list[int] | None]:
    """Returns the groups of the answers to every prompt. Questions about all prompts are asked in common waves; equal
    texts need no question."""
    groupings = [RULES[rule](len(answers), needed) for answers in texts]
    groups: list[list[int] | None] = [None] * len(prompts)
    known: list[dict[Comparison, Relation]] = [{} for _ in prompts]
    asked: dict[int, Comparison | None] = dict.fromkeys(range(len(prompts)))  # None: not started yet
    while asked:
        waiting: dict[int, Comparison] = {}
        for k, comparison in asked.items():
            answer = None if comparison is None else known[k][comparison]
            try:
                while True:
                    i, j = groupings[k].send(answer)  # pyright: ignore[reportArgumentType] (None begins it)
                    comparison = Comparison(prompts[k], texts[k][i], texts[k][j])
                    answer = Relation.ENTAILMENT if texts[k][i] == texts[k][j] else known[k].get(comparison)
                    if answer is None:
                        waiting[k] = comparison
                        break
            except StopIteration as end:
                groups[k] = end.value
                known[k].clear()
        for (k, comparison), relation in zip(waiting.items(), judge(list(waiting.values())), strict=True):
            known[k][comparison] = relation
        asked = dict(waiting)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Outcome of one prompt: a pair, or the reason why there is none."""

    reason: str
    """accepted, unsure (no group is large enough), unanimous (all answers are in one group), tied (two equal scores)"""
    chosen: int = -1
    rejected: int = -1
    size: int = 0
    """Members of the largest group; 0 if unknown."""


def choose(
    answers: Answers, groups: Sequence[int] | None, scores: Sequence[float], needed: int, draw: np.random.Generator
) -> Choice:
    """Makes the pair of one prompt from the group and the score of each answer."""
    if groups is None:
        return Choice(reason="unsure")
    sizes = Counter(groups)
    size = max(sizes.values())
    if size < needed:
        return Choice(reason="unsure", size=size)
    in_largest = [i for i, group in enumerate(groups) if sizes[group] == size]
    chosen = max(in_largest, key=lambda i: (scores[i], -groups.index(groups[i]), -i))
    outside = [
        i
        for i, group in enumerate(groups)
        if group != groups[chosen] and answers.responses[i] != answers.responses[chosen]
    ]
    if not outside:
        return Choice(reason="unanimous", size=size)
    return Choice(reason="accepted", chosen=chosen, rejected=outside[int(draw.integers(len(outside)))], size=size)


def choose_by(answers: Answers, values: Sequence[float], draw: np.random.Generator) -> Choice:
    """Makes the pair of the ablations: of two random answers that differ, the one with the higher value is chosen."""
    if not answers.differ:
        return Choice(reason="unanimous")
    first, second = two_that_differ(answers, draw)
    if values[first] == values[second]:
        return Choice(reason="tied")
    first, second = sorted((first, second), key=lambda i: -values[i])
    return Choice(reason="accepted", chosen=first, rejected=second)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """The pairs of a round and a report on its prompts."""

    pairs: list[TokenizedExample] = field(repr=False)
    report: dict[str, float | list[int] | dict[str, list[int]]]


def synthetic_pairs(
    config: RLPConfig,
    answers: Sequence[Answers],
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    judge: EquivalenceJudge | None,
) -> Synthetic:
    """Makes at most one pair per prompt; `prompts`, `texts` and `scores` belong to `answers`, in the same order.

    `judge` is None if `pairing` needs none. The draws are keyed by (seed, row). Report: prompts, accepted,
    unsure, unanimous, tied, pairs (after `max_synthetic_pairs`), acceptance_rate, sizes (prompts by the size of
    their largest group from 0, unknown, to n), chosen_length and rejected_length (mean tokens), calibration (see
    `calibrate`).
    """
    choices, needed = [], num_needed(config.min_confidence, config.num_answers)
    groups: Sequence[list[int] | None] = [None] * len(answers)
    calibration: dict[str, list[int]] = {}
    if config.pairing == "spg":
        assert judge is not None
        if config.num_calibration_prompts:
            some = slice(config.num_calibration_prompts)
            calibration = calibrate(config, prompts[some], texts[some], judge)
        stop = needed if config.early_reject else 0
        groups = group_answers(prompts, texts, judge, config.clustering, stop)
    for one, grouped, score in zip(answers, groups, scores, strict=True):
        draw = np.random.default_rng([config.seed, PAIR_STREAM, one.row])
        if config.pairing == "spg":
            choices.append(choose(one, grouped, score, needed, draw))
        else:
            choices.append(choose_by(one, score if config.pairing == "reward" else one.logprob, draw))
    pairs = [_pair(one, choice) for one, choice in zip(answers, choices, strict=True) if choice.reason == "accepted"]
    if 0 < config.max_synthetic_pairs < len(pairs):
        order = np.random.default_rng([config.seed, SUBSET_STREAM]).permutation(len(pairs))
        pairs = [pairs[i] for i in sorted(order[: config.max_synthetic_pairs].tolist())]
    reasons = Counter(choice.reason for choice in choices)
    sizes = Counter(choice.size for choice in choices)
    report = {
        "prompts": len(answers),
        **{name: reasons[name] for name in ("accepted", "unsure", "unanimous", "tied")},
        "pairs": len(pairs),
        "acceptance_rate": reasons["accepted"] / max(1, len(answers)),
        "sizes": [sizes[size] for size in range(config.num_answers + 1)],
        "chosen_length": _mean(len(pair.chosen or ()) for pair in pairs),
        "rejected_length": _mean(len(pair.rejected or ()) for pair in pairs),
        "calibration": calibration,
    }
    return Synthetic(pairs=pairs, report=report)


def calibrate(
    config: RLPConfig, prompts: Sequence[str], texts: Sequence[Sequence[str]], judge: EquivalenceJudge
) -> dict[str, list[int]]:
    """Counts the prompts by the size of their largest group, from 0 to n, under the rule of the run, strict and lax,
    with all answers compared. Warns if the rule of the run accepts hardly any prompt."""
    needed, sizes = num_needed(config.min_confidence, config.num_answers), {}
    for rule in dict.fromkeys((config.clustering, "strict", "lax")):
        largest = Counter(
            max(Counter(groups).values()) for groups in group_answers(prompts, texts, judge, rule) if groups
        )
        sizes[rule] = [largest[size] for size in range(config.num_answers + 1)]
    # Prompts below `needed` give no pair, and neither do unanimous prompts (the last entry).
    shares = {rule: sum(counts[needed:-1]) / max(1, len(prompts)) for rule, counts in sizes.items()}
    told = ", ".join(f"{rule} {100 * share:.1f} %" for rule, share in shares.items())
    log.info("spg: prompts among the first %d that give a pair: %s", len(prompts), told)
    if shares[config.clustering] < FEW:
        log.warning("spg: clustering %s gives hardly any pair (%s); choose another rule", config.clustering, told)
    return sizes


def _pair(answers: Answers, choice: Choice) -> TokenizedExample:
    chosen, rejected = answers.responses[choice.chosen], answers.responses[choice.rejected]
    return TokenizedExample(prompt=answers.prompt, chosen=chosen, rejected=rejected, row=answers.row)


def _mean(values: Generator[int]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
