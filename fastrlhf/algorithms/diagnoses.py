"""Recognises common problems of DPO runs in the metrics, and explains each once per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WINDOW = 10
"""Number of steps of a window. The mean over the latest window is compared with the mean over the first one."""

BOTH_FALL = (
    "the log-probs of chosen and rejected responses both fall ({chosen:+.1f} and {rejected:+.1f} nats) while the "
    "margin rises: the loss depends only on the difference. This is no error; to keep chosen responses likely, add "
    "the loss sft (loss_type: [sigmoid, sft]) or lower learning_rate"
)
SATURATED = (
    "rewards are saturated: accuracy {accuracy:.2f}, margin {margin:.1f}, so the loss has almost no gradient; "
    "lower beta, train for fewer steps, or let ipo bound the margin"
)


class Diagnoses:
    """Examines the metrics of every step, and reports each finding once."""

    def __init__(self, losses: Sequence[str]) -> None:
        self._losses = losses
        self._first: list[Mapping[str, float]] = []
        self._last: list[Mapping[str, float]] = []
        self._told: set[str] = set()

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns the texts of findings that are new at this step, usually none. `metrics` are the metrics of
        `train_dpo`."""
        if len(self._first) < WINDOW:
            self._first.append(metrics)
        self._last = [*self._last[-WINDOW + 1 :], metrics]
        if self._first[-1] is self._last[-1] or len(self._last) < WINDOW:
            return []
        change = {
            name: _mean(self._last, name) - _mean(self._first, name) for name in metrics if name.startswith("logps/")
        }
        chosen, rejected = change["logps/chosen"], change["logps/rejected"]
        margin, accuracy = _mean(self._last, "rewards/margins"), _mean(self._last, "rewards/accuracies")
        found = {
            BOTH_FALL: "sft" not in self._losses
            and max(chosen, rejected) < -1
            and margin > max(0.0, _mean(self._first, "rewards/margins")),
            # sigmoid(-10) is 5e-5. This check excludes ipo, whose target may be a large margin.
            SATURATED: "ipo" not in self._losses and accuracy > 0.99 and margin > 10,
        }
        new = [text for text, holds in found.items() if holds and text not in self._told]
        self._told.update(new)
        return [text.format(chosen=chosen, rejected=rejected, accuracy=accuracy, margin=margin) for text in new]


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
