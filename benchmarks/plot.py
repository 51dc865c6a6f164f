"""A figure with a panel for each thing varied, as SVG: the same bytes for the same numbers."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

Points = list[tuple[float, dict[str, float]]]
"""Values of what varies, and what each contestant takes there."""
Lines = dict[str, tuple[str, str]]
"""Of each contestant: what it is called, and its colour."""


def figure(title: str, panels: dict[str, Points], lines: Lines) -> Figure:
    """Two panels in a row, over the same range, both axes logarithmic."""
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
    """Text stays text; no date and no random names."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dwakd"}):
        drawn.savefig(path, metadata={"Date": None})
