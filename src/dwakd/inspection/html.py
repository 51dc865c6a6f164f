"""Make the sections of an HTML page from an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from dwakd.inspection.charts import LONGEST, heat_map
from dwakd.inspection.checks import Finding
from dwakd.inspection.computed import Computed
from dwakd.inspection.tokens import MATCHES, NAMES, Row, Summary
from dwakd.report import page

_MAPS = f"""Each cell is a pair of tokens, of the first {LONGEST} tokens of each model. The stronger its blue, the larger the
attention or the probability of the pair. Orange frames mark pairs that match exactly, dashed ones match by group. Grey
cells are the band of Soft-DTW."""


def overview_section(summary: Summary, findings: Sequence[Finding]) -> page.Section:
    """Return the section with the counts of a sample and the warnings."""
    warnings = [
        Markup('<p class="finding"><strong>{}.</strong> {}</p>').format(name[0].upper() + name[1:], text)
        for name, text in findings
    ] or [page.paragraph("No common mistake was found in these rows.")]
    parts = [_style(), page.facts(summary.facts()), *warnings]
    if numbers := [(number.text, number.student, number.teacher) for number in summary.examples()]:
        caption = "Some numbers that are not matched exactly. | divides tokens."
        parts.append(page.table(["number", "student's tokens", "teacher's tokens"], numbers, caption=caption))
    return page.Section("Tokens of both models", page.join(*parts))


def row_section(row: Row, computed: Sequence[Computed], *, with_prompt: bool) -> page.Section:
    """Return the section of one row: prompts, paired tokens, and what the methods computed."""
    parts = [_style()]
    for name, side in zip(NAMES, row.sides if with_prompt else (), strict=False):
        summary = f"Prompt of the {name}, not supervised ({side.num_prompt} tokens)"
        parts.append(page.details(summary, page.data_text(side.prompt)))
    parts += _paired(row)
    if row.truncated:
        removed = page.data_text(row.removed or "the end token")
        parts.append(Markup('<div class="finding"><strong>Cut, not supervised</strong> {}</div>').format(removed))
    for one in computed:
        parts.append(Markup("<h3>What {} computed</h3>").format(one.method))
        for place, title, values in one.values:
            tokens = [
                Markup('<span class="token" style="--v:{:.0f}%" title="{:.3f}">{}</span>').format(
                    85 * value / (max(values) or 1.0), value, token.text
                )
                for token, value in zip(row.sides[place].tokens, values, strict=True)
            ]
            parts.append(Markup('<p class="value">{}; the strongest blue is {:.2f}</p>').format(title, max(values)))
            parts.append(Markup('<div class="values" dir="auto">{}</div>').format(page.join(*tokens)))
        charts = [
            page.chart(heat_map(row, table, title, one.outside_band), f"heat map, {title}")
            for title, table in one.maps.items()
        ]
        if charts:
            parts += [page.paragraph(_MAPS), Markup('<div class="maps">{}</div>').format(page.join(*charts))]
    return page.Section(f"Row {row.number}", page.join(*parts))


def _style() -> Markup:
    css = resources.files(__package__).joinpath("tokens.css").read_text(encoding="utf-8")
    return Markup("<style>{}</style>").format(Markup(css))


def _paired(row: Row) -> list[Markup]:
    """Return the byte groups of a row as boxes, with the student's tokens above the teacher's."""
    groups = []
    for match, sides in row.groups():
        tokens = [[Markup('<span class="token">{}</span>').format(text) for text in side] for side in sides]
        lines = page.join(*(Markup("<span>{}</span>").format(page.join(*side)) for side in tokens))
        groups.append(Markup('<span class="pair {}">{}</span>').format(match, lines))
    counts = " and ".join(
        f"{len(side.tokens)} tokens of the {name}" for name, side in zip(NAMES, row.sides, strict=False)
    )
    found = [page.paragraph(f"Response, supervised: {counts}, the end token included.")]
    if len(row.sides) > 1:
        legend = [Markup('<span class="pair {}"><span>{}</span></span>').format(*item) for item in MATCHES.items()]
        text = "Each box covers the same bytes: the student's tokens above, the teacher's below."
        found.append(Markup('<p class="legend">{} {}</p>').format(text, page.join(*legend)))
    return [*found, Markup('<div class="pairs" dir="auto">{}</div>').format(page.join(*groups))]
