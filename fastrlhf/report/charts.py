"""Draws SVG charts, namely line charts and interval bars, by pure functions from arrays to markup.

Colours, fonts and line widths come from the style sheet of the page (CSS variables `--c0` .. `--c7`), so that charts
follow its light and dark themes. Labels are escaped here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Range = tuple[float, float]

NUM_COLORS = 8
BUCKETS = 160
"""A curve is drawn with at most two points (lowest and highest) per bucket of steps: about one per pixel."""
SMOOTH_FROM = 40
"""Curves with at least this many points also get a moving average."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 182, 40, 12, 20, 34
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_MARGIN = 4
"""Curves may extend beyond the plot by this many units, so that lines and dots at its edges are not clipped."""
_MOST_HITS = 40
"""Maximum number of steps per curve whose values appear under the mouse; of a longer curve, evenly spaced steps are
chosen."""
_DIGIT = 6
"""Width of one digit of an axis label, rounded up."""
_FURTHEST = 1e300
"""Values above this are drawn at this value, so that the height of the plot stays finite."""
_NEAREST = 1e-290
"""Values that differ by less than this count as equal, so that the height of the plot stays above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric of one run."""

    label: str
    steps: Array
    """[n] positions on the horizontal axis, increasing"""
    values: Array
    """[n] values; the curve has a gap at a value that is not finite"""
    color: int = 0
    dashed: bool = False


def line_chart(title: str, curves: list[Curve], over: str = "steps", unit: str = "") -> str:
    """Draws a chart: a caption with the last value of every curve, named axes, and the curves over optimiser steps (or
    over the quantity that `over` names). The values of a step are shown when the mouse is over the step.

    Long curves are drawn twice: the raw values in a faint colour, and their centred moving average. For a long curve
    the vertical axis may leave out the lowest and the highest 1 % of the points (at most five each), so that a single
    spike does not flatten the curve.
    """
    x_range = _widened(min(c.steps[0] for c in curves), max(c.steps[-1] for c in curves), least=1.0)
    y_range = _value_range(curves)
    labels = _y_labels(y_range)
    # Long labels widen the left margin.
    more = max(0, _DIGIT * max(len(label) for _, label in labels) - (_LEFT - 5))
    prefix, _, name = title.rpartition("/")
    family = f"<small>{escape(prefix)}/</small>" if prefix else ""
    drawn = "".join(_draw(curve, x_range, y_range) for curve in curves)
    box, told = f"{-more} 0 {_WIDTH + more} {_HEIGHT}", f"{title} over {over}"
    clip = f"{-_MARGIN} {-_MARGIN} {_PLOT_WIDTH + 2 * _MARGIN} {_PLOT_HEIGHT + 2 * _MARGIN}"
    x, y, width, height = _LEFT - _MARGIN, _TOP - _MARGIN, *clip.split()[2:]
    axis_names = f'<text x="{-more}" y="10">{escape(unit or name)}</text>'
    axis_names += f'<text class="over" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}">{escape(over)}</text>'
    return (
        f"<figure><figcaption><b>{family}{escape(name)}</b>{_key(curves)}</figcaption>"
        f'<svg viewBox="{box}" role="img" aria-label="{escape(told)}">'
        f"{_axes(x_range, y_range, labels, whole=over == 'steps')}{axis_names}"
        f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{clip}">{drawn}</svg>'
        f"{_hits(curves, x_range, 'step' if over == 'steps' else over)}</svg></figure>\n"
    )


def interval_bar(value: float, low: float, high: float, color: int) -> str:
    """Draws a probability and its interval on a scale from 0 to 1 with a mark at 0.5."""
    x, x_low, x_high = (4 + 132 * min(max(number, 0.0), 1.0) for number in (value, low, high))
    return (
        '<svg class="bar" viewBox="0 0 140 16" width="140" height="16" aria-hidden="true">'
        '<line class="track" x1="4" x2="136" y1="8" y2="8"/><line class="half" x1="70" x2="70" y1="1" y2="15"/>'
        f'<g style="stroke:var(--c{color});fill:var(--c{color})">'
        f'<line class="interval" x1="{x_low:.1f}" x2="{x_high:.1f}" y1="8" y2="8"/>'
        f'<circle cx="{x:.1f}" cy="8" r="4"/></g></svg>'
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns at most `most` + 1 axis ticks within [low, high], low < high: multiples of 1, 2 or 5 times a power of
    ten.

    ticks(0, 1, 4)  ->  [0.0, 0.5, 1.0]
    """
    step = _tick_step(low, high, most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Returns one label per tick, all with the same unit and number of decimals.

    [0.0, 0.05, 0.1] -> 0.00 0.05 0.10;  [0, 5000, 10000] -> 0 5k 10k;  [0, 2e-6] -> 0, 2e-6
    """
    largest = max(abs(value) for value in values)
    if len(values) == 1 or largest < 1e-3 or largest >= 1e12:
        return [format_number(value) for value in values]
    scale, unit = _unit(largest)
    decimals = max(0, -math.floor(math.log10((values[1] - values[0]) / scale) + 1e-9))
    return [f"{value / scale:.{decimals}f}{unit}" if value or not unit else "0" for value in values]


def format_number(value: float) -> str:
    """Formats a number for display, with at most four significant digits: 0.6931, 12.35, 48.2k, 3e-6, nan."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    scale, unit = _unit(size)
    return f"{value / scale:.4g}{unit}"


def _unit(size: float) -> tuple[float, str]:
    return next(((scale, unit) for least, scale, unit in _UNITS if size >= least), (1.0, ""))


_UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""(smallest number that gets the suffix, factor, suffix letter)"""


def thin(steps: Array, values: Array, buckets: int = BUCKETS) -> tuple[Array, Array]:
    """Reduces a curve to at most about 2 * `buckets` points: the lowest and the highest of every bucket of steps, so
    that no spike is lost."""
    if len(values) <= 2 * buckets:
        return steps, values
    parts = np.array_split(np.arange(len(values)), buckets)
    kept = sorted({int(part[f(values[part])]) for part in parts for f in (np.argmin, np.argmax)} | {len(values) - 1})
    return steps[kept], values[kept]


def moving_average(steps: Array, values: Array, points: int = BUCKETS) -> tuple[Array, Array]:
    """Returns at most `points` steps and, for each of them, the mean of the finite values in a window of 1/20 of the
    curve around it."""
    num = len(values)
    centres = np.unique(np.linspace(0, num - 1, min(points, num)).round().astype(int))
    around = [values[max(at - num // 40, 0) : at + num // 40 + 1] for at in centres]
    return steps[centres], np.array([_finite_mean(part) for part in around])


def _finite_mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _tick_step(low: float, high: float, most: int) -> float:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))


def _widened(low: float, high: float, least: float) -> Range:
    """Returns (low, high) or, if both are equal, a range of width `least` around them."""
    return (low, high) if high > low else (low - least / 2, high + least / 2)


def _value_range(curves: list[Curve]) -> Range:
    """Returns the range of the vertical axis: the range of the values plus 4 % on either side. The axis is extended to
    0 if all values have the same sign and come close to 0."""
    lows, highs = [], []
    for curve in curves:
        finite = curve.values[np.isfinite(curve.values)].clip(-_FURTHEST, _FURTHEST)
        if len(finite):
            trim = min(0.01, 5 / len(finite)) if len(finite) >= SMOOTH_FROM else 0.0
            lows.append(float(np.quantile(finite, trim)))
            highs.append(float(np.quantile(finite, 1 - trim)))
    low, high = (min(lows), max(highs)) if lows else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size + _NEAREST:  # all values are equal up to rounding
        low, high = _widened(low, low, least=0.2 * size if size > _NEAREST else 1.0)
    if 0 < low < 0.3 * high:
        low = 0.0
    if 0 > high > 0.3 * low:
        high = 0.0
    room = 0.04 * (high - low)
    return (low - room if low else low, high + room if high else high)


def _draw(curve: Curve, x_range: Range, y_range: Range) -> str:
    finite = np.isfinite(curve.values)
    values = np.where(finite, curve.values.clip(-_FURTHEST, _FURTHEST), np.nan)
    long = int(finite.sum()) >= SMOOTH_FROM
    kind = "raw" if long else "line" if finite.sum() > 1 else "dot"
    paths = [f'<path class="{kind}" d="{_path(curve.steps, values, x_range, y_range)}"/>']
    if long:
        paths.append(f'<path class="line" d="{_path(*moving_average(curve.steps, values), x_range, y_range)}"/>')
    hover = f"{curve.label}: {len(values)} points"
    if finite.any():
        low, high = (format_number(f(curve.values[finite])) for f in (np.min, np.max))
        hover += f", from {low} to {high}"
    dashed = ' class="dashed"' if curve.dashed else ""
    return f'<g{dashed} style="stroke:var(--c{curve.color})"><title>{escape(hover)}</title>{"".join(paths)}</g>'


def _hits(curves: list[Curve], x_range: Range, over: str) -> str:
    """Draws invisible strips over the plot, one per step, each with a tooltip (title) that shows the values of its
    step."""
    steps = sorted({step for curve in curves for step in _spread(curve.steps)})
    if len(steps) > 3 * _MOST_HITS:  # happens with many runs that logged different steps
        steps = list(_spread(np.array(steps)))
    places = [_LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * _PLOT_WIDTH for step in steps]
    middles = [(a + b) / 2 for a, b in pairwise(places)]
    strips = []
    for step, left, right in zip(steps, [_LEFT, *middles], [*middles, _WIDTH - _RIGHT], strict=True):
        values = [
            f"{escape(curve.label)} {format_number(float(value))}"
            for curve in curves
            for value in curve.values[curve.steps == step][:1]
        ]
        title = "\n".join([f"{over} {format_number(step)}", *values])
        strips.append(f'<rect x="{left:.1f}" width="{max(right - left, 0.1):.1f}"><title>{title}</title></rect>')
    return f'<g class="hits">{"".join(strips)}</g>'


def _spread(steps: Array) -> list[float]:
    """Selects at most `_MOST_HITS` of the steps, evenly spaced, including the first and the last."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_HITS)).round().astype(int))
    return [float(step) for step in steps[chosen]]


def _path(steps: Array, values: Array, x_range: Range, y_range: Range) -> str:
    """Returns the SVG path of a curve, in pieces between values that are not finite. A piece of one point becomes a
    dot, because line caps are round."""
    pieces = []
    edges = np.flatnonzero(np.diff(np.isfinite(values).astype(int), prepend=0, append=0))
    for start, stop in edges.reshape(-1, 2):
        share = max(1, BUCKETS * int(stop - start) // len(values))
        x, y = thin(steps[start:stop], values[start:stop], share)
        x = (x - x_range[0]) / (x_range[1] - x_range[0]) * _PLOT_WIDTH
        y = (y_range[1] - y) / (y_range[1] - y_range[0]) * _PLOT_HEIGHT
        # Huge coordinates overflow in renderers. Points that far outside the plot are invisible anyway.
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, y.clip(-1e4, 1e4), strict=True)]
        pieces.append("M" + " ".join(points) + ("h0" if len(points) == 1 else ""))
    return "".join(pieces)


def _y_labels(y_range: Range) -> list[tuple[float, str]]:
    values = ticks(*y_range, 4)
    return list(zip(values, tick_labels(values), strict=True))


def _axes(x_range: Range, y_range: Range, y_labels: list[tuple[float, str]], whole: bool) -> str:
    """Draws grid lines, ticks and labels; with `whole`, the ticks of the horizontal axis are whole numbers."""
    parts = []
    for value, label in y_labels:
        y = _TOP + (y_range[1] - value) / (y_range[1] - y_range[0]) * _PLOT_HEIGHT
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{y + 3:.1f}">{label}</text>')
    x_ticks = [value for value in ticks(*x_range, 4) if not whole or value == int(value)]
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = _LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * _PLOT_WIDTH
        parts.append(f'<text class="x" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 14}">{label}</text>')
    return "".join(parts)


def _key(curves: list[Curve]) -> str:
    """Draws the legend: the label and last value of every curve."""
    items = []
    for curve in curves:
        bad = int((~np.isfinite(curve.values)).sum())
        warning = f' <em title="values that are nan or inf">{bad} not finite</em>' if bad else ""
        dot = f'<i style="background:var(--c{curve.color})"></i>'
        items.append(
            f"<span{' class=dashed' if curve.dashed else ''}>{dot}{escape(curve.label)} "
            f"<b>{format_number(float(curve.values[-1]))}</b>{warning}</span>"
        )
    return f'<div class="key">{"".join(items)}</div>'
