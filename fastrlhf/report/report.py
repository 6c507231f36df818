"""Writes report.html, one self-contained page made from the files in the directory of a run.

The page needs no network and no script. It shows those of the following files that exist:
    summary.json    the table of results of a demo or of an evaluation
    metrics.jsonl   charts in groups (panels.py), for the directory itself and for the stages in its sub-folders; stages
    that log the same metrics (ppo and drpo, or two seeds) share their charts
    samples.jsonl   the last samples: in on-policy runs with each token coloured by its reward, after `fastrlhf eval`
    with the answers of every model to each prompt
    config.yaml     the resolved configuration
"""

from __future__ import annotations

import json
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastrlhf.report.charts import NUM_COLORS, format_number, interval_bar
from fastrlhf.report.page import render_page, scrolling, write_page
from fastrlhf.report.panels import CHART_NOTE, render_charts
from fastrlhf.report.samples import has_token_rewards, token_samples
from fastrlhf.report.stages import Stage, find_stages, overlaid
from fastrlhf.runtime.metrics import read_rows

MAX_SAMPLES = 12
"""Number of samples shown per stage. The page shows the last samples."""

MAX_PROMPTS = 6
"""Number of prompts shown after `fastrlhf eval`, each with the answers of every model. The page shows the last
prompts."""

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


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Writes the page to `path`, by default `run_dir`/report.html, and returns its path. An existing page is replaced.

    Raises:
        ValueError: the directory holds neither metrics nor a summary, one of its files is malformed, or the page
            cannot be written.
    """
    run_dir = Path(run_dir)
    path = path or run_dir / "report.html"
    stages = find_stages(run_dir)
    summary = _read_summary(run_dir / "summary.json")
    if not stages and not summary:
        raise ValueError(
            f"{run_dir}: nothing to report: no metrics.jsonl, here or in a sub-folder, and no summary.json; "
            "give the output directory of a run"
        )
    title = str(summary.get("task") or run_dir.resolve().name)
    groups = overlaid(stages)
    sections = [("Results", _results(summary, stages))] if summary.get("methods") else []
    sections += [(", ".join(stage.name for stage in group), render_charts(group)) for group in groups]
    sections += [("Samples", samples)] if (samples := _samples(run_dir, stages)) else []
    sections += [("Configuration", config)] if (config := _configs(run_dir, stages)) else []
    write_page(path, render_page(title, _facts(summary, stages), sections, footer=CHART_NOTE if stages else ""))
    return path


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fix or delete the file") from error
    methods = summary.get("methods", {}) if isinstance(summary, dict) else None
    if not isinstance(methods, dict) or not all(isinstance(row, dict) for row in methods.values()):
        raise ValueError(f'{path}: expected {{"methods": {{name: {{...}}}}, ...}}; fix or delete the file')
    return summary


def _results(summary: dict[str, Any], stages: list[Stage]) -> str:
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
    note = "Bars range from 0 to 100 %, with a dotted mark at 50 %. Grey numbers are the bounds of an interval."
    table = f'<table class="results"><thead><tr><th>Method</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'{scrolling(table)}\n<p class="muted">{note}</p>'


def _cell(key: str, value: Any, interval: Any, color: int) -> str:
    """Renders a number with its interval; a win rate is shown in per cent with a bar."""
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


def _percent(value: float) -> str:
    return f"{100 * value:.1f}&nbsp;%"


def _samples(run_dir: Path, stages: list[Stage]) -> str:
    parts = []
    for name, path in _directories(run_dir, stages):
        file = path / "samples.jsonl"
        rows = read_rows(file) if file.exists() else []
        if rows:
            compared = "model" in rows[-1]
            rows = _side_by_side(rows) if compared else rows[-MAX_SAMPLES:]
            what = "prompts, with the answers of each model" if compared else f"{len(rows)} samples"
            colored = [row for row in rows if has_token_rewards(row)]
            shown = token_samples(colored) if colored else ""
            shown += _sample_table([row for row in rows if not has_token_rewards(row)])
            parts.append(
                f"<details{'' if parts else ' open'}><summary>{escape(name)}: last {what}</summary>{shown}</details>\n"
            )
    return "".join(parts)


def _side_by_side(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups the answers of all models to the last `MAX_PROMPTS` prompts by prompt; only the first row of a group shows
    the prompt."""
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
    return scrolling(f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def _sample_cell(value: Any) -> str:
    """Renders a cell of the table of samples. A column with long texts keeps a readable width, and the table scrolls;
    other columns are as wide as their content."""
    text = _text(value)
    return f"<td{' class=text' if len(text) > 40 else ''}><div>{escape(text)}</div></td>"


def _configs(run_dir: Path, stages: list[Stage]) -> str:
    return "".join(
        f"<details><summary>{escape(name)}: config.yaml</summary><pre>{escape(file.read_text('utf-8', 'replace'))}"
        "</pre></details>\n"
        for name, path in _directories(run_dir, stages)
        if (file := path / "config.yaml").exists()
    )


def _directories(run_dir: Path, stages: list[Stage]) -> list[tuple[str, Path]]:
    """Lists the directory of the run first, then those of its stages."""
    names = {run_dir: run_dir.resolve().name} | {stage.path: stage.name for stage in stages}
    return [(name, path) for path, name in names.items()]


def _text(value: Any) -> str:
    """Formats a value of a sample as text: numbers are rounded, and a conversation becomes one line per turn."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return ", ".join(map(format_number, value))
    if isinstance(value, list) and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return json.dumps(value, ensure_ascii=False)


def _facts(summary: dict[str, Any], stages: list[Stage]) -> list[str]:
    """Returns the facts under the title: those of the summary, and the steps and seconds of every stage."""
    facts = []
    for name, value in summary.items():
        if name not in ("task", "methods"):
            parts = value if isinstance(value, dict) else {"": value}
            facts += [f"{name} {part}".replace("_", " ").strip() + f" {_text(parts[part])}" for part in parts]
    for stage in stages:
        times = [row.get("time", 0.0) for row in stage.rows]
        # In a resumed run the seconds start again at 0.
        seconds = sum(b - a if b >= a else b for a, b in pairwise([0.0, *times]))
        facts.append(f"{stage.name}: step {format_number(stage.rows[-1]['step'])}, {seconds:.0f} s")
    return facts
