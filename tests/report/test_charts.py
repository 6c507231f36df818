import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fastrlhf.report.charts import (
    BUCKETS,
    Curve,
    format_number,
    interval_bar,
    line_chart,
    moving_average,
    thin,
    tick_labels,
    ticks,
)


def curve(values, label="run", steps=None):
    values = np.asarray(values, dtype=np.float64)
    return Curve(
        label=label, steps=np.arange(1.0, len(values) + 1) if steps is None else np.array(steps), values=values
    )


def paths(figure):
    return re.findall(r' d="([^"]*)"', figure)


def coordinates(path):
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


@pytest.mark.parametrize("values", [[0.99997, 0.99999], [-0.99997, -0.99999], [0.0, 1.0], [1.23e-7, 1.25e-7]])
def test_the_box_has_room_for_the_longest_label(values):
    """The view box of the SVG must start further left if a label (six units per character) would not fit."""
    figure = line_chart("ratio", [curve(values)])
    left, width = map(float, re.findall(r'viewBox="(\S+) 0 (\S+) 182"', figure)[0])
    labels = re.findall(r'class="y" x="(\d+)".*?>(.*?)<', figure)
    assert left == min(0, *(int(x) - 6 * len(label) for x, label in labels))
    assert left + width == 320
    assert (left < 0) == (max(len(label) for _, label in labels) > 5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (1, 400, [100, 200, 300, 400]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (9, 21, [10, 15, 20]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert ticks(low, high, 4) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.05, 0.1], ["0.00", "0.05", "0.10"]),
        ([0, 5000, 10000], ["0", "5k", "10k"]),
        ([500000, 1000000, 1500000], ["0.5M", "1.0M", "1.5M"]),
        ([0, 2e-6], ["0", "2e-6"]),
        ([12.5], ["12.5"]),
        ([-20, 0, 20], ["-20", "0", "20"]),
    ],
)
def test_tick_labels_share_unit_and_decimals(values, expected):
    assert tick_labels(values) == expected


def test_numbers_are_formatted_for_reading():
    assert [format_number(x) for x in (0.693147, 12.3456, 48213, 1234567, 3e-6, -0.00012, 0, 5120, float("nan"))] == [
        *("0.6931", "12.35", "48.21k", "1.235M", "3e-6", "-1.2e-4", "0", "5120", "nan")
    ]


def test_thinning_keeps_every_spike():
    values = np.random.default_rng(0).normal(size=10000)
    values[[1234, 7777]] = 50.0, -50.0
    steps, kept = thin(np.arange(10000.0), values)
    assert len(kept) <= 2 * BUCKETS + 1
    assert (kept == values[steps.astype(int)]).all()
    assert {50.0, -50.0} <= set(kept)
    assert (np.diff(steps) > 0).all()
    assert steps[-1] == 9999


def test_the_moving_average_of_a_line_is_the_line_and_skips_what_is_not_finite():
    values = np.arange(400.0)
    values[200] = np.nan
    steps, mean = moving_average(np.arange(400.0), values, points=400)
    assert mean[20:190] == pytest.approx(steps[20:190], abs=1e-9)
    assert mean[200] == pytest.approx(200.0, abs=1e-9)


def test_a_curve_runs_from_corner_to_corner():
    (path,) = paths(line_chart("m", [curve([0.0, 1.0, 2.0])]))
    (x0, y0), (x1, y1), (x2, y2) = coordinates(path)
    assert x0 == 0
    assert x2 == 2 * x1
    assert y0 > y1 > y2 > 0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


def test_values_that_are_not_finite_leave_a_gap_and_are_counted():
    figure = line_chart("m", [curve([1.0, np.nan, 3.0, 4.0, np.inf])])
    (path,) = paths(figure)
    assert path.count("M") == 2
    assert len(coordinates(path)) == 3
    assert "2 not finite" in figure


def test_one_spike_does_not_flatten_a_long_curve():
    values = np.linspace(0.0, 1.0, 200)
    values[50] = 1e6
    raw, _ = paths(line_chart("m", [curve(values)]))
    heights = [y for _, y in coordinates(raw) if y > -1000]
    assert max(heights) - min(heights) > 100


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.0, 0.0], [np.nan], [np.inf, -np.inf], [1e308, -1e308], [0.0, 5e-324], [1.0, 1.0 + 2e-16], [-3.0] * 50],
)
def test_any_values_give_a_figure_that_is_well_formed_and_finite(values):
    figure = line_chart("m", [curve(values), curve([1e-5])])
    ET.fromstring(figure)
    for path in paths(figure):
        assert not re.search("nan|inf|e", path)


def test_labels_are_escaped():
    figure = line_chart('"><script>', [curve([1.0], label="<b>&")])
    ET.fromstring(figure)
    assert "<script>" not in figure
    assert "&lt;b&gt;&amp;" in figure


def test_the_interval_bar_places_a_half_in_the_middle():
    bar = interval_bar(0.5, 0.0, 1.0, 3)
    assert 'x1="4.0" x2="136.0"' in bar
    assert 'cx="70.0"' in bar
    assert "var(--c3)" in bar


def test_both_axes_have_a_name():
    figure = line_chart("logps/chosen", [curve([1.0, 2.0])], unit="nats")
    assert re.findall(r"<text x=[^>]*>(.*?)<", figure) == ["nats"]
    assert re.findall(r'class="over"[^>]*>(.*?)<', figure) == ["steps"]
    assert re.findall(r"<text x=[^>]*>(.*?)<", line_chart("a/<b>", [curve([1.0, 2.0])])) == ["&lt;b&gt;"]


def test_hovering_shows_the_values_of_a_step():
    """Each step has one hover strip, which reaches halfway to the previous and the next step and lists the curves with
    a value at this step."""
    figure = line_chart("m", [curve([1.0, 2.0, 4.0]), curve([0.25], label="eval", steps=[2.0])])
    strips = re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"><title>(.*?)</title>', figure, flags=re.DOTALL)
    assert [title for _, _, title in strips] == ["step 1\nrun 1", "step 2\nrun 2\neval 0.25", "step 3\nrun 4"]
    edges = [(float(x), float(x) + float(width)) for x, width, _ in strips]
    assert edges == [(40.0, 107.0), (107.0, 241.0), (241.0, 308.0)]


def test_a_long_curve_has_a_strip_for_its_first_and_last_step_and_some_between():
    figure = line_chart("m", [curve(np.arange(1000.0))])
    steps = [int(float(step)) for step in re.findall(r"<title>step (\d+)\n", figure)]
    assert len(steps) == 40
    assert (steps[0], steps[-1]) == (1, 1000)


def test_dots_and_lines_at_the_edge_of_the_plot_are_whole():
    """The drawing area extends 4 units beyond the plot on every side, so that dots (radius 3) on its edge are whole."""
    figure = line_chart("m", [curve([1.0, 2.0]), curve([2.0], steps=[2.0])])
    assert '<svg x="36" y="16" width="276" height="136" viewBox="-4 -4 276 136">' in figure
    assert 'class="dot" d="M268.0,' in figure


def test_a_dashed_curve_is_also_dashed_in_the_legend():
    plain, dashed = curve([1.0, 2.0]), curve([2.0, 3.0], label="eval")
    figure = line_chart("m", [plain, Curve(label="eval", steps=dashed.steps, values=dashed.values, dashed=True)])
    assert figure.count('<g class="dashed"') == figure.count("<span class=dashed>") == 1


def test_ticks_of_steps_are_whole_numbers_and_other_ticks_are_round():
    def ticks_of(over):
        return re.findall(r'<text class="x"[^>]*>(.*?)<', line_chart("m", [curve([1, 2], steps=[0.0, 1.0])], over=over))

    assert ticks_of("steps") == ["0", "1"]
    assert ticks_of("sqrt(KL)") == ["0.0", "0.5", "1.0"]
