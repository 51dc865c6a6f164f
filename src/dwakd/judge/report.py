"""Show the verdicts as a table and as a bar chart."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dwakd.folders import write_file

logger = logging.getLogger(__name__)

_COLORS = {"A wins": "#2a78b5", "tie": "#c9c9c9", "B wins": "#d9822b"}
_ROWS = {
    "win": "A wins",
    "tie": "tie",
    "loss": "B wins",
    "win_rate": "win rate of A, a tie is half a win",
    "length_controlled_win_rate": "length-controlled win rate of A",
    "order_dependent": "verdict depends on the order",
    "first_preferred": "prefers the answer it read first",
    "pairs": "pairs",
    "without_verdict": "pairs without a verdict",
    "without_request": "equal or empty answers, not judged",
    "mean_length_difference": "A minus B, characters per answer",
}


def judge_table(names: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a column for each test set: shares in percent with 95 % intervals, and counts."""

    def shown(value: Any) -> str:
        if not isinstance(value, dict):
            return f"{value:.0f}"
        return "-" if value["percent"] is None else "{percent:.1f} [{low:.1f}, {high:.1f}]".format(**value)

    title = Text(f"A: {names[0]}\nB: {names[1]}", overflow="fold")
    table = Table("% [95 % interval]", box=box.HORIZONTALS, show_edge=False, title=title, title_justify="left")
    for name in results:
        table.add_column(Text(name), justify="right", overflow="fold")
    for key, label in _ROWS.items():
        if any(key in result for result in results.values()):
            table.add_row(label, *(shown(result[key]) if key in result else "-" for result in results.values()))
    return table


def write_plot(names: Sequence[str], results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write an SVG with a stacked bar for each test set and the intervals of its two outer shares.

    Without altair, a warning says what to install.
    """
    try:
        import altair as alt
        import vl_convert  # noqa: F401  # altair needs it to save
    except ImportError:
        logger.warning("no plot is written: install its packages with pip install 'dwakd[judge]'")
        return
    keys = ("win", "tie", "loss")
    bars = [
        {"set": name, "verdict": label, "place": place, "percent": result[key]["percent"]}
        for name, result in results.items()
        for place, (label, key) in enumerate(zip(_COLORS, keys, strict=True))
    ]
    known = {name: result for name, result in results.items() if result["pairs"] > result["without_verdict"]}
    lines = [{"set": name, **result["win"]} for name, result in known.items()]
    lines += [{"set": s, "low": 100 - r["loss"]["high"], "high": 100 - r["loss"]["low"]} for s, r in known.items()]
    row = alt.Y("set:N", title=None, sort=list(results))
    colors = alt.Color("verdict:N", title=None, legend=alt.Legend(orient="bottom")).scale(
        domain=list(_COLORS), range=list(_COLORS.values())
    )
    share = alt.X("percent:Q", title="% of the pairs").scale(domain=[0, 100])
    stacked = alt.Chart(alt.InlineData(bars)).mark_bar().encode(row, share, colors, alt.Order("place:O"))
    intervals = alt.Chart(alt.InlineData(lines)).mark_rule(strokeWidth=2).encode(row, x="low:Q", x2="high:Q")
    title = alt.Title([f"A: {names[0]}", f"B: {names[1]}"], anchor="start")
    text = io.StringIO()
    (stacked + intervals).properties(width=480, height={"step": 36}, title=title).save(text, format="svg")
    write_file(path, text.getvalue().encode())
