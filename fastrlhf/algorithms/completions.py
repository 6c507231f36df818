"""Samples several answers of a policy to each prompt, which RLP uses to refit its reward model (Lang et al. 2024, arXiv
2403.19279)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf.data.packing import group
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.runtime.atomic import write_file
from fastrlhf.types import Prefix, Segment, TokenizedExample

ANSWER_STREAM = 4
"""Stream of the random draws of answers; no other sampler of a run uses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """n responses of a policy to a prompt, in the order in which they were sampled, including repeats."""

    row: int
    prompt: list[int]
    responses: list[list[int]]
    logprob: list[float]
    """Mean log-prob per token of each response, in nats, under the policy at the sampling temperature."""

    @property
    def tree(self) -> list[Segment]:
        """Returns the tree for scoring, in which the prompt is computed once for all responses."""
        return group(self.prompt, self.responses, scored=False, share_prompt=True)

    @property
    def differ(self) -> bool:
        return any(response != self.responses[0] for response in self.responses)


def sample_answers(
    engine: TransformersEngine, examples: Sequence[TokenizedExample], num_answers: int, round_: int
) -> list[Answers]:
    """Samples `num_answers` answers per prompt. The random draws are keyed by (the engine's seed, round, place of
    the prompt, answer)."""
    rollouts = engine.generate(
        [
            Prefix(
                token_ids=example.prompt,
                num_reset=0,
                row=example.row,
                episode=(round_ << 40) + i * num_answers + k,
            )
            for i, example in enumerate(examples)
            for k in range(num_answers)
        ]
    )
    return [
        Answers(
            row=example.row,
            prompt=example.prompt,
            responses=[rollout.completion for rollout in drawn],
            logprob=[float(np.mean(rollout.sampler_logprob)) for rollout in drawn],
        )
        for i, example in enumerate(examples)
        for drawn in [rollouts[i * num_answers : (i + 1) * num_answers]]
    ]


def two_that_differ(answers: Answers, draw: np.random.Generator) -> tuple[int, int]:
    """Draws two responses with different tokens and returns their indices. `answers.differ` must be true."""
    while True:
        first, second = draw.choice(len(answers.responses), 2, replace=False).tolist()
        if answers.responses[first] != answers.responses[second]:
            return first, second


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line. The file gets its name only when it is complete."""
    write_file(path, "".join(f"{json.dumps(row)}\n" for row in rows))
