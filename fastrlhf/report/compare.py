"""`fastrlhf report RUN RUN ...`: writes one page that compares runs by their last values, their different settings and
their curves in shared charts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fastrlhf.report.charts import NUM_COLORS, format_number
from fastrlhf.report.page import render_page, render_table, write_page
from fastrlhf.report.panels import CHART_NOTE, last_values, render_charts
from fastrlhf.report.stages import Stage, find_stages, overlaid


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Writes one page that compares several runs to `path`, replacing an existing page, and returns `path`.

    Raises ValueError, naming the folder, if a folder is given twice or holds no metrics.
    """
    names = _names(run_dirs)
    stages: list[Stage] = []
    for name, run_dir in zip(names, run_dirs, strict=True):
        found = find_stages(run_dir)
        if not found:
            raise ValueError(
                f"{run_dir}: no metrics.jsonl, here or in a sub-folder; give the output directory of a run"
            )
        own = run_dir.resolve().name
        for stage in found:
            label = name if stage.name == own and stage.path == run_dir else f"{name}/{stage.name}"
            stages.append(replace(stage, name=label, color=len(stages) % NUM_COLORS))
    sections = [("Last values", _table("Metric", stages, last_values(stages)))]
    if different := _different_settings(stages):
        sections.append(("Settings that differ", _table("Key", stages, different)))
    sections += [(", ".join(stage.name for stage in group), render_charts(group)) for group in overlaid(stages)]
    facts = [f"{name}: {run_dir}" for name, run_dir in zip(names, run_dirs, strict=True)]
    write_page(path, render_page(f"{len(names)} runs compared", facts, sections, footer=CHART_NOTE))
    return path


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Returns the names of the folders, or, if two names are equal, the paths relative to the common parent."""
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    for i, run_dir in enumerate(resolved):
        if run_dir in resolved[:i]:
            raise ValueError(f"{run_dirs[i]}: given twice; give different runs to compare")
    names = [run_dir.name for run_dir in resolved]
    if len({*names}) < len(names):
        common = os.path.commonpath(resolved)
        names = [run_dir.relative_to(common).as_posix() for run_dir in resolved]
    return names


def _different_settings(stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Returns key -> name of the stage -> value, for the keys of config.yaml whose values differ between the stages."""
    settings: dict[str, dict[str, Any]] = {}
    for stage in stages:
        file = stage.path / "config.yaml"
        content = yaml.safe_load(file.read_text("utf-8", "replace")) if file.exists() else None
        for key, value in content.items() if isinstance(content, dict) else ():
            settings.setdefault(str(key), {})[stage.name] = value
    return {
        key: values
        for key, values in settings.items()
        if key not in ("output_dir", "run_name") and len({repr(value) for value in values.values()}) > 1
    }


def _table(first: str, stages: Sequence[Stage], rows: dict[str, dict[str, Any]]) -> str:
    names = [stage.name for stage in stages]
    cells = [[name, *(_text(values.get(of, "")) for of in names)] for name, values in rows.items()]
    return render_table([first, *names], cells)


def _text(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
