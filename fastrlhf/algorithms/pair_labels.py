"""Computes the probability that one response is better than another, from labels of the data or from a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.algorithms.psipo import label_probability, reward_preferences
from fastrlhf.algorithms.scoring import Tree, reward_scores
from fastrlhf.config import DPOConfig
from fastrlhf.data.labels import COUNTS, UnusableRow, read_group_labels, read_pair_labels
from fastrlhf.data.tokens import TextRules
from fastrlhf.types import TokenizedExample


def pair_probabilities(
    config: DPOConfig,
    examples: Sequence[TokenizedExample],
    trees: Sequence[Tree],
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules | None = None,
) -> Tensor | None:
    """Returns P(chosen is better) [B] float64 on the CPU, by `label_source`; None if every label is hard."""
    match config.label_source:
        case "data":
            return None
        case "label_prob":
            labels = [_read(example, ("label_prob",)) for example in examples]
            return torch.tensor([label["label_prob"] for label in labels], dtype=torch.float64)
        case "counts":
            counts = [_read(example, COUNTS) for example in examples]
            for example, count in zip(examples, counts, strict=True):
                if config.label_prior == 0 and count["num_labels"] == 0:
                    raise ValueError(f"row {example.row} has num_labels 0; set a label_prior above 0 or remove the row")
            wins, labels = (torch.tensor([count[name] for count in counts]) for name in COUNTS)
            return label_probability(wins, labels, config.label_prior)
        case _:
            scores = torch.stack(reward_scores(config, examples, trees, tokenizer, rules)).double()
            return torch.sigmoid(config.score_scale * (scores[:, 0] - scores[:, 1]))


def pair_margins(examples: Sequence[TokenizedExample]) -> Tensor:
    """Returns the column `margin` of the rows, [B] float32 on the CPU."""
    return torch.tensor([_read(example, ("margin",))["margin"] for example in examples], dtype=torch.float32)


def group_preferences(
    config: DPOConfig,
    examples: Sequence[TokenizedExample],
    trees: Sequence[Tree],
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules | None = None,
) -> list[Tensor]:
    """Returns the matrix P(i is better than j), [K, K] float64 on the CPU, for every group, by `label_source`. Raises
    ValueError, naming the row, for invalid labels."""
    if config.label_source == "reward_model":
        return [
            reward_preferences(config.score_scale * scores.double())
            for scores in reward_scores(config, examples, trees, tokenizer, rules)
        ]
    return [_labelled(config, example) for example in examples]


def _read(example: TokenizedExample, names: Sequence[str]) -> dict[str, Any]:
    try:
        return read_pair_labels({name: getattr(example, name) for name in names}, names)
    except UnusableRow as bad:
        raise ValueError(f"row {example.row}: {bad}") from None


def _labelled(config: DPOConfig, example: TokenizedExample) -> Tensor:
    assert example.responses is not None
    given = {"preferences": example.preferences, "scores": example.scores}
    try:
        labels = read_group_labels(given, len(example.responses))
    except UnusableRow as bad:
        raise ValueError(f"row {example.row}: {bad}") from None
    if not labels:
        raise ValueError(
            f"row {example.row} has neither preferences nor scores of its responses; add one of these columns, "
            "or set label_source to reward_model"
        )
    if "scores" in labels:
        return reward_preferences(config.score_scale * torch.tensor(labels["scores"], dtype=torch.float64))
    return torch.tensor(labels["preferences"], dtype=torch.float64)
