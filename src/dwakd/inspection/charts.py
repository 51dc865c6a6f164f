"""Draw what a loss computed for pairs of tokens as a heat map."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dwakd.inspection.tokens import Row

LONGEST = 64
"""Number of tokens of each model that a heat map shows."""


def heat_map(row: Row, values: Tensor, title: str, outside_band: Tensor | None = None) -> Any:
    """Return an Altair chart with a cell for each pair of a student token and a teacher token.

    The stronger the blue of a cell, the larger its value. Orange frames mark pairs that match exactly, dashed frames pairs
    that match by group, and grey cells the band of Soft-DTW.

    Args:
        row: the row whose tokens are the axes.
        values: a number of at least 0 for each pair, of shape (student tokens, teacher tokens).
        title: title of the chart.
        outside_band: True for pairs outside the band; None to draw no band.
    """
    import altair as alt

    cells = []
    for i, own in enumerate(row.sides[0].tokens[:LONGEST]):
        for j, theirs in enumerate(row.sides[1].tokens[:LONGEST]):
            match = own.match if own.group == theirs.group else "none"
            inside = outside_band is not None and not bool(outside_band[i, j])
            if match != "none" or inside or values[i, j] >= 0.005:
                names = {"student": f"{i + 1:03} {own.text}", "teacher": f"{j + 1:03} {theirs.text}"}
                cells.append({**names, "value": round(float(values[i, j]), 3), "match": match, "band": inside})
    axis: dict[str, Any] = {"labelExpr": "substring(datum.label, 4)", "labelOverlap": False, "labelLimit": 90}
    base = alt.Chart(alt.InlineData(values=cells)).encode(
        alt.X("teacher:N", title="teacher's tokens", axis=alt.Axis(orient="top", labelAngle=-60, **axis)),
        alt.Y("student:N", title="student's tokens", axis=alt.Axis(**axis)),
        tooltip=["student:N", "teacher:N", "value:Q", "match:N"],
    )
    opacity = alt.Opacity("value:Q", scale=alt.Scale(domain=[0, float(values.max())], range=[0, 1]), legend=None)
    frame: dict[str, Any] = {"filled": False, "stroke": "#e08a00", "strokeWidth": 1.6}
    layers = [
        base.mark_rect(color="#8a93a0", opacity=0.16).transform_filter("datum.band"),
        base.mark_rect(color="#2a7de1").encode(opacity),
        base.mark_rect(**frame, strokeDash=[2, 2]).transform_filter("datum.match == 'group'"),
        base.mark_rect(**frame).transform_filter("datum.match == 'exact'"),
    ]
    heading = f"{title}, up to {float(values.max()):.2f}"
    return alt.layer(*layers).properties(width=alt.Step(15), height=alt.Step(15), title=heading)
