"""Show an inspection in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.columns import Columns
from rich.console import RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dwakd.inspection.checks import Finding
from dwakd.inspection.computed import Computed
from dwakd.inspection.tokens import MATCHES, NAMES, Row, Summary

STYLES = {"exact": "green", "group": "yellow", "none": "red"}


def overview(summary: Summary, findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Yield the counts of a sample and the warnings."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, value in summary.facts():
        table.add_row(name, value)
    for number in summary.examples():
        table.add_row("", _plain(f"{number.text}: student {number.student}  teacher {number.teacher}"))
    yield table
    for name, text in findings:
        yield Text.assemble(("warning ", "bold yellow"), (f"{name}: ", "bold"), _plain(text))


def row_view(row: Row, computed: Sequence[Computed], *, with_prompt: bool) -> Iterator[RenderableType]:
    """Yield the prompts, the paired tokens and what the methods computed for one row."""
    yield Rule(f"row {row.number} (counting from 0)")
    for name, side in zip(NAMES, row.sides if with_prompt else (), strict=False):
        title = f"prompt of the {name}, not supervised: {side.num_prompt} tokens"
        yield Panel(_plain(side.prompt), title=title, title_align="left", box=box.SQUARE, style="dim")
    legend = ((f"{text}; ", STYLES[match]) for match, text in MATCHES.items())
    yield Text.assemble("supervised, student above teacher; ", *legend, "| divides tokens")
    groups = ((match, ("|".join(tokens) for tokens in sides)) for match, sides in row.groups())
    yield Columns([_plain("\n".join((*lines, "")), STYLES[match]) for match, lines in groups], padding=(0, 1))
    if row.truncated:
        yield Text.assemble(("cut, not supervised: ", "bold red"), _plain(row.removed or "the end token"))
    for one in computed:
        for place, title, values in one.values:
            text, largest = Text(f"{one.method}, {title}, up to {max(values):.2f}: "), max(values) or 1.0
            for token, value in zip(row.sides[place].tokens, values, strict=True):
                colour = ",".join(str(round(40 + value / largest * (full - 40))) for full in (42, 125, 225))
                text.append_text(_plain(token.text, f"white on rgb({colour})")).append(" ")
            yield text


def _plain(text: str, style: str = "") -> Text:
    """Write control characters, which a terminal would obey, as escapes."""
    return Text("".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text), style)
