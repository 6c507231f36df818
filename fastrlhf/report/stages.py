"""Reads what a run has logged: one stage per folder with a metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf.report.charts import NUM_COLORS, Curve
from fastrlhf.runtime.metrics import read_metrics

RECENT = 20
"""Number of last steps over which the scores by reset depth are averaged."""

DEPTH = "drpo/score_depth_"
_JUDGES = {"training judge": "eval_objective/scores", "held-out judge": "eval_held_out/scores"}
_ORDER = ("sft", "reward", "dpo", "ipo", "kto", "ppo", "grpo", "drpo", "rto", "rlp")
_HOUSEKEEPING = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "num_unique_tokens",
    "timing",
    "system",
}
"""Metrics, and families of metrics, that stages of every kind log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One directory with a metrics.jsonl."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    color: int

    @property
    def metrics(self) -> list[str]:
        """Returns the names of the metrics that are numbers, in order of first appearance."""
        numeric = (name for row in self.rows for name, value in row.items() if isinstance(value, int | float))
        return [name for name in dict.fromkeys(numeric) if name not in ("step", "time")]

    def curve(self, metric: str, part: str = "", shift: int = 0, dashed: bool = False) -> Curve:
        """Returns one metric over steps; if a step has several rows, the last one counts. `part` is added to the label,
        to distinguish the curve from others in the chart."""
        last = {row["step"]: row[metric] for row in self.rows if isinstance(row.get(metric), int | float)}
        steps = sorted(last)
        return Curve(
            label=f"{self.name}, {part}" if part else self.name,
            steps=np.array(steps, dtype=np.float64),
            values=np.array([last[step] for step in steps], dtype=np.float64),
            color=(self.color + shift) % NUM_COLORS,
            dashed=dashed,
        )

    @property
    def depth_curve(self) -> list[Curve]:
        """Returns curves of the score by reset depth: for each bin the mean of the last `RECENT` values, over the share
        of the response that the reset copied, in per cent. The list is empty if the stage has no resets."""
        bins = sorted(int(name.removeprefix(DEPTH)) for name in self.metrics if name.startswith(DEPTH))
        means = [self.curve(f"{DEPTH}{i}").values[-RECENT:].mean() for i in bins]
        middles = np.array([20.0 * i + 10 for i in bins])
        return [Curve(label=self.name, steps=middles, values=np.array(means), color=self.color)] if bins else []

    @property
    def optimisation_curves(self) -> list[Curve]:
        """Returns for each judge the gain of its score since the first evaluation as a function of sqrt(KL), as in Gao
        et al. 2022 (arXiv 2210.10760, Figure 1). The list is empty if fewer than two evaluations have the scores of
        both judges."""
        names = ("eval_objective/kl", *_JUDGES.values())
        rows = {row["step"]: [row.get(name) for name in names] for row in self.rows}
        points = np.array([values for values in rows.values() if all(map(is_finite, values))])
        if len(points) < 2:
            return []
        distance = np.sqrt(points[:, 0].clip(min=0))  # the estimate of a KL near 0 may be negative
        order = distance.argsort(kind="stable")
        return [
            Curve(
                label=f"{self.name}, {judge}",
                steps=distance[order],
                values=(points[:, 1 + i] - points[0, 1 + i])[order],
                color=(self.color + i * NUM_COLORS // 2) % NUM_COLORS,
            )
            for i, judge in enumerate(_JUDGES)
        ]


def find_stages(run_dir: Path) -> list[Stage]:
    """Finds the stages in a directory and in its sub-folders at any depth, in the order of the pipeline (sft, reward,
    ...)."""
    found = []
    for file in run_dir.rglob("metrics.jsonl"):
        name = file.parent.relative_to(run_dir).as_posix()
        rows = read_metrics(file)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("step"), int):
                raise ValueError(
                    f'{file}, line {number}: "step" is not a whole number; is this a metrics file of a run?'
                )
        if rows:
            found.append((name if name != "." else run_dir.resolve().name, file.parent, rows))

    def position(stage: tuple[str, Path, Any]) -> tuple[int, str]:
        kind = stage[0].rsplit("/")[-1]
        return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), stage[0])

    return [
        Stage(name=name, path=path, rows=rows, color=i % NUM_COLORS)
        for i, (name, path, rows) in enumerate(sorted(found, key=position))
    ]


def overlaid(stages: list[Stage]) -> list[list[Stage]]:
    """Groups stages that have at least half of their metrics in common, for example ppo and drpo, but not sft and
    reward."""

    def signature(stage: Stage) -> set[str]:
        return {m for m in stage.metrics if m not in _HOUSEKEEPING and m.split("/")[0] not in _HOUSEKEEPING}

    groups: list[list[Stage]] = []
    for stage in stages:
        mine = signature(stage)
        for group in groups:
            other = signature(group[0])
            if 2 * len(mine & other) >= len(mine | other):
                group.append(stage)
                break
        else:
            groups.append([stage])
    return groups


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
