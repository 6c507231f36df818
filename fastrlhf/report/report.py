"""report.html: one self-contained page from what a run leaves in its directory.

The page needs no network and no script. It shows, as far as they are there:
    summary.json    the table of methods of a demo, or of models that were compared
    metrics.jsonl   one chart per metric, of the directory itself and of the stages in its sub-folders; stages that log
                    the same metrics (ppo and drpo, two seeds) share their charts; scores by reset depth are one chart,
                    and so are the judges of training and evaluation over the square root of the KL
    samples.jsonl   the last samples, of an on-policy run with the colour of what every token earned; of models that
                    were compared, the last prompts, each with the answers of all
    config.yaml     the resolved configuration
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf.report.charts import NUM_COLORS, Curve, format_number, interval_bar, line_chart
from fastrlhf.report.page import render_page
from fastrlhf.report.samples import has_token_rewards, token_samples
from fastrlhf.runtime.metrics import read_metrics, read_rows

MAX_SAMPLES = 12
"""Samples shown per stage: the last ones."""

MAX_PROMPTS = 6
"""Prompts shown, each with the answers of all models that were compared."""

RECENT = 20
"""Of the scores by reset depth, the last so many are averaged."""

_DEPTH = "drpo/score_depth_"
_JUDGES = {"training judge": "eval_objective/scores", "held-out judge": "eval_held_out/scores"}
_ORDER = ("sft", "reward", "dpo", "ipo", "ppo", "drpo", "rto", "rlp")
_HOUSEKEEPING = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "num_unique_tokens",
    "timing",
    "perf",
}
"""Metrics and families that every stage logs, whatever it trains."""
_LEADING = ("", "objective", "eval_objective", "reward", "rewards")
"""Families that say how a run fares, the bare names first: their charts come first."""
_COUNTERS = ("grad_norm", "learning_rate", "epoch", "episode", "num_tokens", "num_unique_tokens")
"""Ends of the bare names that say no more than that it runs: their charts come last, before those of seconds."""
_CHART_NOTE = (
    "Horizontal axes count optimiser steps, where the title names nothing else. Faint: every step; bold: the mean "
    "over 1/20 of the run. A few spikes may leave the frame of a long curve. Numbers beside the names are the last "
    "values."
)
_COLUMNS = {
    "win_rate": "Win rate",
    "gold_reward": "Gold reward",
    "minus_sft": "Gold minus SFT",
    "mean_score": "Mean score",
    "mean_difference": "Score difference",
    "num": "Prompts",
    "rm_score": "RM score",
    "kl": "KL (nats)",
    "mean_length": "Mean length",
    "seconds": "Seconds",
    "tokens": "Tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One directory with a metrics.jsonl."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    color: int

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that are numbers, in order of first appearance."""
        numeric = (name for row in self.rows for name, value in row.items() if isinstance(value, int | float))
        return [name for name in dict.fromkeys(numeric) if name not in ("step", "time")]

    def curve(self, metric: str) -> Curve:
        last = {row["step"]: row[metric] for row in self.rows if isinstance(row.get(metric), int | float)}
        steps = sorted(last)
        return Curve(
            label=self.name,
            steps=np.array(steps, dtype=np.float64),
            values=np.array([last[step] for step in steps], dtype=np.float64),
            color=self.color,
        )

    @property
    def depth_curve(self) -> list[Curve]:
        """The scores by reset depth: each bin's last `RECENT` values in the mean, over the share of the response that
        was given away, in per cent; none where the stage has no resets."""
        bins = sorted(int(name.removeprefix(_DEPTH)) for name in self.metrics if name.startswith(_DEPTH))
        means = [self.curve(f"{_DEPTH}{i}").values[-RECENT:].mean() for i in bins]
        middles = np.array([20.0 * i + 10 for i in bins])
        return [Curve(label=self.name, steps=middles, values=np.array(means), color=self.color)] if bins else []

    @property
    def optimisation_curves(self) -> list[Curve]:
        """What each judge's score has gained since the first evaluation, over sqrt(KL): Gao et al. 2022 (arXiv
        2210.10760, Figure 1). None where fewer than two evaluations have both judges' scores."""
        names = ("eval_objective/kl", *_JUDGES.values())
        rows = {row["step"]: [row.get(name) for name in names] for row in self.rows}
        points = np.array([values for values in rows.values() if all(map(_is_finite, values))])
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


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. An older report is replaced.

    Raises:
        ValueError: the directory holds neither metrics nor a summary, or one of its files is malformed.
    """
    run_dir = Path(run_dir)
    stages = _find_stages(run_dir)
    summary = _read_summary(run_dir / "summary.json")
    if not stages and not summary:
        raise ValueError(
            f"{run_dir}: nothing to report, neither metrics.jsonl (here or in a sub-folder) nor summary.json; "
            "give the output directory of a run"
        )
    title = str(summary.get("task") or run_dir.resolve().name)
    groups = _overlaid(stages)
    sections = [("Results", _results(summary, stages))] if summary.get("methods") else []
    sections += [(", ".join(stage.name for stage in group), _charts(group)) for group in groups]
    sections += [("Samples", samples)] if (samples := _samples(run_dir, stages)) else []
    sections += [("Configuration", config)] if (config := _configs(run_dir, stages)) else []
    path = run_dir / "report.html"
    page = render_page(title, _facts(summary, stages), sections, footer=_CHART_NOTE if stages else "")
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _find_stages(run_dir: Path) -> list[_Stage]:
    """The directory itself and its sub-folders at any depth, in the order of the pipeline."""
    found = []
    for file in run_dir.rglob("metrics.jsonl"):
        name = file.parent.relative_to(run_dir).as_posix()
        rows = read_metrics(file)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("step"), int):
                raise ValueError(f'{file}, line {number}: no whole number "step"; is this a metrics file of a run?')
        if rows:
            found.append((name if name != "." else run_dir.resolve().name, file.parent, rows))

    def position(stage: tuple[str, Path, Any]) -> tuple[int, str]:
        kind = stage[0].rsplit("/")[-1]
        return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), stage[0])

    return [
        _Stage(name=name, path=path, rows=rows, color=i % NUM_COLORS)
        for i, (name, path, rows) in enumerate(sorted(found, key=position))
    ]


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); mend or delete the file") from error
    methods = summary.get("methods", {}) if isinstance(summary, dict) else None
    if not isinstance(methods, dict) or not all(isinstance(row, dict) for row in methods.values()):
        raise ValueError(f'{path}: expected {{"methods": {{name: {{...}}}}, ...}}; mend or delete the file')
    return summary


def _overlaid(stages: list[_Stage]) -> list[list[_Stage]]:
    """Stages that have at least half of their metrics in common: ppo with drpo, but never sft with reward."""

    def signature(stage: _Stage) -> set[str]:
        return {m for m in stage.metrics if m not in _HOUSEKEEPING and m.split("/")[0] not in _HOUSEKEEPING}

    groups: list[list[_Stage]] = []
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


def _charts(stages: list[_Stage]) -> str:
    """One chart per metric, in the order of `_in_families`, and those that are made of several."""
    metrics = dict.fromkeys(metric for stage in stages for metric in stage.metrics if not metric.startswith(_DEPTH))
    figures = (
        line_chart(metric, [stage.curve(metric) for stage in stages if metric in stage.metrics])
        for metric in _in_families(metrics)
    )
    if by_depth := [curve for stage in stages for curve in stage.depth_curve]:
        title = f"drpo/score by % of the response given away, last {RECENT} steps"
        figures = chain(figures, [line_chart(title, by_depth, over="reset depth")])
    if judged := [curve for stage in stages for curve in stage.optimisation_curves]:
        title = "score gained since the first evaluation, over sqrt(KL)"
        figures = chain(figures, [line_chart(title, judged, over="distance from the reference")])
    return f'<div class="charts">{"".join(figures)}</div>'


def _in_families(metrics: Iterable[str]) -> list[str]:
    """Those of a family, the part of the name before '/', stand together: what tells how the run fares, the rest as it
    was logged, counters and seconds."""
    families: dict[str, list[str]] = {family: [] for family in _LEADING}
    last: dict[str, list[str]] = {"": [], "timing": [], "perf": []}
    for metric in metrics:
        family = metric.split("/")[0] if "/" in metric else ""
        late = metric.endswith(_COUNTERS) if not family else family in last
        (last if late else families).setdefault(family, []).append(metric)
    return [metric for family in (*families.values(), *last.values()) for metric in family]


def _results(summary: dict[str, Any], stages: list[_Stage]) -> str:
    methods: dict[str, dict[str, Any]] = summary["methods"]
    present = dict.fromkeys(key for row in methods.values() for key in row)
    keys = [key for key in _COLUMNS if key in present]
    keys += [key for key in present if key not in keys and not (key.endswith("_ci") and key[:-3] in present)]
    colors = {stage.name: stage.color for stage in stages}
    head = "".join(f"<th>{escape(_COLUMNS.get(key, key.replace('_', ' ')))}</th>" for key in keys)
    body = ""
    for i, (method, row) in enumerate(methods.items()):
        color = colors.get(method, i % NUM_COLORS)
        cells = "".join(f"<td>{_cell(key, row.get(key), row.get(f'{key}_ci'), color)}</td>" for key in keys)
        body += f'<tr><th><i style="background:var(--c{color})"></i>{escape(method)}</th>{cells}</tr>\n'
    note = "Bars run from 0 to 100 %, the dotted mark is 50 %. Grey numbers are the ends of an interval."
    return (
        f'<div class="wide"><table class="results"><thead><tr><th>Method</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>\n<p class="muted">{note}</p>'
    )


def _cell(key: str, value: Any, interval: Any, color: int) -> str:
    """A number and its interval; a win rate in per cent and with a bar."""
    if value is None:
        return '<span class="muted">&ndash;</span>'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(_text(value))
    show = _percent if key == "win_rate" else format_number
    if not (
        isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval)
    ):
        return show(value)
    low, high = interval
    bar = interval_bar(value, low, high, color) if key == "win_rate" else ""
    return f'{bar}{show(value)} <span class="muted">{show(low)} to {show(high)}</span>'


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}&nbsp;%"


def _samples(run_dir: Path, stages: list[_Stage]) -> str:
    parts = []
    for name, path in _directories(run_dir, stages):
        file = path / "samples.jsonl"
        rows = read_rows(file) if file.exists() else []
        if rows:
            compared = "model" in rows[-1]
            rows = _side_by_side(rows) if compared else rows[-MAX_SAMPLES:]
            what = "prompts, and what each model answered" if compared else f"{len(rows)} samples"
            colored = [row for row in rows if has_token_rewards(row)]
            shown = token_samples(colored) if colored else ""
            shown += _sample_table([row for row in rows if not has_token_rewards(row)])
            parts.append(
                f"<details{'' if parts else ' open'}><summary>{escape(name)}: last {what}</summary>{shown}</details>\n"
            )
    return "".join(parts)


def _side_by_side(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all models to the last `MAX_PROMPTS` prompts, prompt after prompt, which is named once."""
    answers: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        answers.setdefault(row.get("row"), []).append(row)
    once = {"row": "", "prompt": ""}
    return [
        row if i == 0 else row | once
        for of_prompt in list(answers.values())[-MAX_PROMPTS:]
        for i, row in enumerate(of_prompt)
    ]


def _sample_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join(f"<tr>{''.join(_sample_cell(row.get(key, '')) for key in keys)}</tr>\n" for row in rows)
    return f'<div class="wide"><table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sample_cell(value: Any) -> str:
    """Columns of texts keep a width to read them at, and the table scrolls; numbers and words take what they need."""
    text = _text(value)
    return f"<td{' class=text' if len(text) > 40 else ''}><div>{escape(text)}</div></td>"


def _configs(run_dir: Path, stages: list[_Stage]) -> str:
    return "".join(
        f"<details><summary>{escape(name)}: config.yaml</summary><pre>{escape(file.read_text('utf-8', 'replace'))}"
        "</pre></details>\n"
        for name, path in _directories(run_dir, stages)
        if (file := path / "config.yaml").exists()
    )


def _directories(run_dir: Path, stages: list[_Stage]) -> list[tuple[str, Path]]:
    """The run's own directory first, then those of its stages."""
    names = {run_dir: run_dir.resolve().name} | {stage.path: stage.name for stage in stages}
    return [(name, path) for path, name in names.items()]


def _text(value: Any) -> str:
    """A sample's field for reading: numbers rounded, conversations as turns."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return ", ".join(map(format_number, value))
    if isinstance(value, list) and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return json.dumps(value, ensure_ascii=False)


def _facts(summary: dict[str, Any], stages: list[_Stage]) -> list[str]:
    """The line under the title: what the summary says of the run, and the length of every stage."""
    facts = []
    for name, value in summary.items():
        if name not in ("task", "methods"):
            parts = value if isinstance(value, dict) else {"": value}
            facts += [f"{name} {part}".replace("_", " ").strip() + f" {_text(parts[part])}" for part in parts]
    for stage in stages:
        times = [row.get("time", 0.0) for row in stage.rows]
        # a resumed run counts its seconds from 0 again
        seconds = sum(b - a if b >= a else b for a, b in pairwise([0.0, *times]))
        facts.append(f"{stage.name}: step {format_number(stage.rows[-1]['step'])}, {seconds:.0f} s")
    return facts
