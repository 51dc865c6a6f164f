"""The charts of a report: curves of training, scores with intervals, and box plots."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeGuard

import altair as alt
import numpy as np
from altair.utils.schemapi import debug_mode
from markupsafe import Markup

from dwakd.report.collect import Run
from dwakd.report.page import chart

COLOURS = (
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#439894", "#d67195", "#b79a20", "#79706e"),
    *("#88b4e0", "#ffbf79", "#88d27a", "#ff9d98", "#d6a5c9", "#d8b5a5", "#83bcb6", "#fcbfd2", "#f2cf5b", "#bab0ac"),
)
"""Colours of the rows of a report, legible on light and on dark paper."""
POINTS = 25_000
"""Most points of all curves together, about 0.8 MB."""


class Score(NamedTuple):
    """A score of a run on a test set, with its 95 % interval."""

    run: Run
    test_set: str
    metric: str
    temperature: str
    value: float
    std: float | None  # over the generation seeds
    low: float | None
    high: float | None
    num_rows: int


def legend(rows: Sequence[str], shown: Collection[str]) -> Markup:
    """Return the names of those rows that are shown, in their colours."""
    item = Markup('<li><span style="background:{}"></span><bdi>{}</bdi></li>')
    items = [item.format(colour, row) for row, colour in zip(rows, _colours(rows), strict=True) if row in shown]
    return Markup('<ul class="legend">{}</ul>').format(Markup().join(items))


def logged_values(runs: Iterable[Run]) -> list[str]:
    """Return the names of the numbers that the runs have logged, in the order of their first occurrence."""
    entries = [entry for run in runs for entry in run.history]
    return list(dict.fromkeys(name for entry in entries for name, value in entry.items() if is_finite(value)))


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that JSON has."""
    return isinstance(value, int | float) and math.isfinite(value)


def curve(name: str, runs: Sequence[Run], rows: Sequence[str], num_curves: int) -> Markup:
    """Draw a logged value by optimiser step, a line for each run.

    Args:
        name: of the value.
        runs: runs that may have logged it.
        rows: all rows of the report, which determine the colours.
        num_curves: number of charts in the report; with many of them, consecutive values are averaged.
    """
    values = []
    for number, run in enumerate(runs):
        points = [
            (x, y) for entry in run.history if is_finite(x := entry.get("step")) and is_finite(y := entry.get(name))
        ]
        size = math.ceil(len(points) / min(max(POINTS // (num_curves * len(runs)), 20), 400)) or 1
        for start in range(0, len(points), size):
            x, y = (_rounded(fmean(part)) for part in zip(*points[start : start + size], strict=True))
            values.append({"x": x, "y": y, "run": number})
    names = [{"run": number, "name": run.name, "row": run.row} for number, run in enumerate(runs)]
    drawn = (
        alt.Chart(_data(values), title=name, width="container", height=190)
        .transform_lookup(lookup="run", from_=alt.LookupData(_data(names), "run", ["name", "row"]))
        .mark_line(strokeWidth=1.6, point=len(values) < 40 * len(runs))
        .encode(
            x=alt.X("x:Q", title="step"),
            y=alt.Y("y:Q", title=None).scale(zero=False),
            color=_row_colour(rows),
            detail="run:N",
            tooltip=[alt.Tooltip("name:N", title="run")],
        )
    )
    return chart(drawn, f"{name} by optimiser step")


def intervals(title: str, scores: Sequence[Score], rows: Sequence[str]) -> Markup:
    """Draw scores of a test set with their intervals: a line for each run, and a shape for each temperature."""
    runs, labels = (
        list(dict.fromkeys(values)) for values in zip(*((one.run.name, one.temperature) for one in scores), strict=True)
    )
    points = []
    for one in scores:
        ends = {name: _rounded(getattr(one, name)) for name in ("value", "low", "high")}
        points.append({"name": one.run.name, "row": one.run.row, "temperature": one.temperature, **ends})
    base = alt.Chart(_data(points)).encode(
        y=alt.Y("name:N", title=None, sort=runs, axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("temperature:N", sort=labels),
        color=_row_colour(rows),
        tooltip=["name:N", "temperature:N", "value:Q", "low:Q", "high:Q"],
    )
    line = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=None).scale(zero=False), x2="high:Q")
    shape = alt.Shape("temperature:N", sort=labels, legend=alt.Legend() if len(labels) > 1 else None)
    point = base.mark_point(filled=True, size=55, opacity=1).encode(x="value:Q", shape=shape)
    height = len(runs) * max(26, 13 * len(labels))
    return chart(
        (line + point).properties(title=title, width="container", height=height), f"{title} with 95 % intervals"
    )


def box_plots(title: str, values: dict[str, list[float]]) -> Markup:
    """Draw the median, the quartiles and the 5th and 95th percentiles of the values of each name."""
    keys = ("low", "first", "median", "third", "high")
    points = [
        {"name": name, **dict(zip(keys, np.percentile(row, [5, 25, 50, 75, 95]).tolist(), strict=True))}
        for name, row in values.items()
        if row
    ]
    base = alt.Chart(_data(points)).encode(
        y=alt.Y("name:N", title=None, sort=list(values)), tooltip=["name:N", *(f"{key}:Q" for key in keys)]
    )
    whole = base.mark_rule().encode(x=alt.X("low:Q", title=None), x2="high:Q")
    box = base.mark_bar(size=16, color=COLOURS[0]).encode(x="first:Q", x2="third:Q")
    median = base.mark_tick(size=16, thickness=2, color="currentColor").encode(x="median:Q")
    drawn = (whole + box + median).properties(title=title, width="container", height=30 * len(values))
    return chart(drawn, f"{title}: median, quartiles, 5th and 95th percentile")


def _data(values: list[dict[str, Any]]) -> alt.InlineData:
    with debug_mode(False):  # validating every value takes longer than all the rest
        return alt.InlineData(values=values)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _row_colour(rows: Sequence[str]) -> alt.Color:
    return alt.Color("row:N", legend=None, scale=alt.Scale(domain=list(rows), range=_colours(rows)))


def _colours(rows: Sequence[str]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(rows))]
