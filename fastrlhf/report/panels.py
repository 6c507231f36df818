"""Arranges the charts of a page: which metrics share a chart, and which charts share a group.

A training metric and its `eval_` counterpart share a chart. So do `chosen` and `rejected`, and the minimum, mean and
maximum of the rewards. A metric that was measured only once is a row of a table instead of a chart with a single dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from fastrlhf.report.charts import Curve, format_number, line_chart
from fastrlhf.report.page import render_table
from fastrlhf.report.stages import DEPTH, RECENT, Stage

CHART_NOTE = (
    "Horizontal axes count optimiser steps unless labelled otherwise. In charts of long curves, faint lines show every "
    "step, bold lines the mean over 1/20 of the run, and a few spikes may lie outside the chart. Dashed lines are "
    "evaluations. Numbers beside the names are last values. Rest the mouse on a chart to read the values of a step."
)

GROUPS = (
    ("Loss and accuracy", r"(^|/)loss$|^loss/|^[a-z_]*(loss|accurac)|/accuracies$"),
    ("Housekeeping", r"^(timing|system)/|^(value_)?(grad_norm|learning_rate)$|^(epoch|episode|num_(unique_)?tokens)$"),
    ("KL and entropy", r"(^|[/_])(kl|approxkl|entropy|jsd|skl)"),
    ("Completions", r"^completions/|length|/(ended|looping|duplicates)$"),
    ("Scores and rewards", r"score|reward|margin|^objective/|^drpo/|^held_out/"),
    ("Log-probs and logits", r"^log(ps|its)/|logprob|log_prob"),
    ("Updates of policy and critic", r"^(policy|value|val|views|hidden_grad|rlp)/|ratio|clip"),
)
"""(heading of a group, pattern of its metrics without the prefix `eval_`). The first match counts; a metric that
matches no pattern is in the group Other."""

ORDER = (
    *("Loss and accuracy", "Scores and rewards", "KL and entropy", "Completions", "Log-probs and logits"),
    *("Updates of policy and critic", "Other", "Housekeeping"),
)
OPEN = ORDER[:3]
"""Groups that are open when the page is loaded; the others open on a click."""

UNITS = {
    r"kl|entropy|^logps|logprob": "nats",
    r"^(eval_)?loss$": "nats",
    r"^timing/": "seconds",
    r"tokens$|length$": "tokens",
    r"tokens_per_second$": "tokens/s",
    r"_gib$": "GiB",
    r"^system/gpu_utilization$": "per cent",
    r"^system/mfu$": "share",
    r"accurac|fraction|clipfrac|/(ended|looping|duplicates)$": "share",
}


def place(metric: str) -> tuple[str, str, str]:
    """Returns (group, title of the chart, name of the curve within the chart) of a metric.

    place("eval_rewards/chosen")  ->  ("Scores and rewards", "rewards/chosen and rejected", "eval chosen")
    """
    base = metric.removeprefix("eval_")
    family, slash, name = base.rpartition("/")
    title, part = base, ""
    if name in ("chosen", "rejected"):
        title, part = f"{family}{slash}chosen and rejected", name
    elif found := re.fullmatch(r"(min|mean|max)_reward", base):
        title, part = "reward: min, mean and max", found[1]
    elif found := re.fullmatch(r"(.*accuracy)_(low|high)", base):
        title, part = found[1], f"95 % {found[2]}"
    group = next((heading for heading, pattern in GROUPS if re.search(pattern, base)), "Other")
    return group, title, f"eval {part}".strip() if metric != base else part


def render_charts(stages: Sequence[Stage]) -> str:
    """Renders the charts of stages that log the same metrics, in groups that can be opened and closed."""
    panels: dict[str, dict[str, dict[str, str]]] = {}  # group -> title -> metric -> part
    for metric in dict.fromkeys(metric for stage in stages for metric in stage.metrics):
        if not metric.startswith(DEPTH):
            group, title, part = place(metric)
            panels.setdefault(group, {}).setdefault(title, {})[metric] = part
    figures: dict[str, list[str]] = {}
    single: dict[str, list[tuple[str, Curve]]] = {}
    for group, titles in panels.items():
        for title, parts in titles.items():
            curves = _curves(stages, parts)
            if any(len(curve.values) > 1 for _, curve in curves):
                chart = line_chart(title, [curve for _, curve in curves], unit=_unit(title))
                figures.setdefault(group, []).append(chart)
            else:
                single.setdefault(group, []).extend(curves)
    scores = figures.setdefault("Scores and rewards", [])
    if by_depth := [curve for stage in stages for curve in stage.depth_curve]:
        title = f"drpo/score by % of the response that resets copied, last {RECENT} steps"
        scores.append(line_chart(title, by_depth, over="% of the response that resets copied"))
    if judged := [curve for stage in stages for curve in stage.optimisation_curves]:
        title = "score gained since the first evaluation, over sqrt(KL)"
        scores.append(line_chart(title, judged, over="sqrt(KL to the reference)"))
    return "".join(
        _group(heading, figures.get(heading, []), single.get(heading, []))
        for heading in ORDER
        if figures.get(heading) or single.get(heading)
    )


def _curves(stages: Sequence[Stage], parts: dict[str, str]) -> list[tuple[str, Curve]]:
    """Returns (metric, curve) for every metric of every stage. The curve of an evaluation is dashed and has the colour
    of the training metric."""
    kinds = list(dict.fromkeys(_color_part(part) for part in parts.values()))
    shift = 3 if len(kinds) > 2 else 4
    return [
        (
            metric,
            stage.curve(metric, part, shift * kinds.index(_color_part(part)), part.startswith(("eval", "95 %"))),
        )
        for metric, part in parts.items()
        for stage in stages
        if metric in stage.metrics
    ]


def _color_part(part: str) -> str:
    return re.sub("^eval ?|95 % (low|high)$", "", part)


def _group(heading: str, charts: Sequence[str], single: Sequence[tuple[str, Curve]]) -> str:
    counts = [f"{len(charts)} chart{'s' * (len(charts) != 1)}"] * bool(charts)
    counts += [f"{len(single)} single value{'s' * (len(single) != 1)}"] * bool(single)
    body = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    if single:
        body += render_table(
            ["Measured once", "Run", "Step", "Value"],
            [[name, _run(curve), f"{curve.steps[0]:.0f}", format_number(curve.values[0])] for name, curve in single],
        )
    opened = " open" if heading in OPEN else ""
    summary = f"<summary>{escape(heading)} <small>{', '.join(counts)}</small></summary>"
    return f'<details class="group"{opened}>{summary}{body}</details>\n'


def _run(curve: Curve) -> str:
    return curve.label.partition(", ")[0]


def _unit(title: str) -> str:
    return next((unit for pattern, unit in UNITS.items() if re.search(pattern, title)), "")


def last_values(stages: Iterable[Stage]) -> dict[str, dict[str, float]]:
    """Returns metric -> name of the stage -> last value, for the metrics of the groups in `OPEN`, in the order of the
    groups."""
    found: dict[str, dict[str, float]] = {}
    for stage in stages:
        for metric in stage.metrics:
            if not metric.startswith(DEPTH) and place(metric)[0] in OPEN:
                found.setdefault(metric, {})[stage.name] = float(stage.curve(metric).values[-1])
    return {metric: found[metric] for metric in sorted(found, key=lambda metric: ORDER.index(place(metric)[0]))}
