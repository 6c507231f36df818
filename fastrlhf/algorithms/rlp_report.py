"""Compares a reward model before and after a refit: accuracy on the policy's answers, drift and spread of the scores,
and whether the loss on views had an effect."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastrlhf.algorithms.completions import Answers, two_that_differ
from fastrlhf.algorithms.rlp_uml import is_active

log = logging.getLogger(__name__)

COMPARED_STREAM = 31
"""Stream of the random draws that pick two answers per prompt; reward models are compared on these pairs."""


def compare_scores(
    seed: int,
    answers: Sequence[Answers],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    worth: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Compares the scores [n] of the answers to each prompt before and after a refit, and with their true values
    `worth`.

    rlp/rm_drift (mean change of a score); rlp/rm_variance_before, _after and _ratio (of the scores within a prompt,
    mean over prompts whose answers differ); on one random pair of different answers per prompt rlp/rm_order_agreement
    (share that both order alike) and, with `worth`, rlp/rm_accuracy_policy_before and _after.
    """
    usable = [i for i, one in enumerate(answers) if one.differ]
    pairs = [
        two_that_differ(answers[i], np.random.default_rng([seed, COMPARED_STREAM, answers[i].row])) for i in usable
    ]

    def margins(values: Sequence[Tensor] | Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(
            [float(values[i][a]) - float(values[i][b]) for i, (a, b) in zip(usable, pairs, strict=True)]
        )

    variances = [_mean([scores[i].var().item() for i in usable]) for scores in (before, after)]
    found = {
        "rlp/rm_drift": float((torch.cat(list(after)) - torch.cat(list(before))).mean()),
        "rlp/rm_order_agreement": agreement(margins(before), margins(after)),
        "rlp/rm_variance_before": variances[0],
        "rlp/rm_variance_after": variances[1],
        "rlp/rm_variance_ratio": variances[1] / variances[0] if variances[0] else 1.0,
    }
    if worth is not None:
        for which, scores in (("before", before), ("after", after)):
            found[f"rlp/rm_accuracy_policy_{which}"] = agreement(margins(scores), margins(worth))
    return found


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Returns the share of differences [N] with equal signs, among those in which `theirs` is not 0. A difference in
    which `ours` is 0 counts one half. 0 if there are no differences."""
    decided = theirs != 0
    if not decided.any():
        return 0.0
    return float(((ours * theirs > 0).float() + 0.5 * (ours == 0))[decided].mean())


def view_activity(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns rlp/views_jsd over the last tenth of a refit and rlp/views_active, and warns if the latter is 0. Returns
    nothing if the loss on views does not estimate mutual information."""
    jsd = [row["views/jsd"] for row in history if "views/jsd" in row]
    if not jsd:
        return {}
    last = _mean(jsd[-max(1, len(jsd) // 10) :])
    if not is_active(jsd):
        log.warning(
            "uml: inactive: the information of the views ends at %.3f, and a critic that distinguishes nothing has "
            "-1.386, so the refit is a second training on the pairs. Try beta_end 0.1, then 0.01, in a new output_dir",
            last,
        )
    return {"rlp/views_jsd": last, "rlp/views_active": float(is_active(jsd))}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
