"""Draw the figure of docs/performance.md as SVG; the same numbers give the same bytes."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

Points = list[tuple[float, dict[str, float]]]
"""Values of the varied size, each with the measurement of every contestant."""
Lines = dict[str, tuple[str, str]]
"""Label and colour of each contestant."""


def figure(title: str, panels: dict[str, Points], lines: Lines) -> Figure:
    """Draw a panel for each varied size, two in a row, with the same y range and logarithmic axes."""
    drawn = Figure(figsize=(8, 3 * ((len(panels) + 1) // 2) + 0.6), layout="constrained")
    grid = drawn.subplots((len(panels) + 1) // 2, 2, sharey=True, squeeze=False)
    for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
        for contestant, (label, colour) in lines.items():
            marks = [(value, taken[contestant]) for value, taken in points if contestant in taken]
            if marks:
                axes.plot(*zip(*marks, strict=True), "o-", color=colour, label=label, gid=f"{contestant}, {name}")
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([value for value, _ in points], [f"{value:,}" for value, _ in points])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    drawn.suptitle(f"{title}, both axes logarithmic")
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines))
    return drawn


def save(drawn: Figure, path: Path) -> None:
    """Save the figure with text as text, without a date and without random names."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dwakd"}):
        drawn.savefig(path, metadata={"Date": None})
