"""Write standalone HTML pages: every script and style is embedded, and a page makes no network request.

A page is a title and sections. The body of a section is `Markup`, made by the helpers of this module, which escape all
text, and joined with `join`:

    points = alt.Chart(alt.Data(values=values)).mark_line().encode(x="step:Q", y="loss:Q")
    body = join(paragraph("The loss of each step."), chart(points, "loss by step"), table(["run", "loss"], rows))
    write_page(Path("report.html"), "Report", [Section("Loss", body)])

Pages have a light and a dark theme. Colours of the theme are the CSS variables `--ink`, `--muted`, `--paper`, `--panel`,
`--line` and `--accent` of page.css. A chart draws its text and axes in the colour of the page's text. The
Content-Security-Policy of a page allows its own two scripts only, so text that was not escaped could not run either.
Attributes that run a script, such as `onclick`, do not work for the same reason; `style` attributes do.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from dwakd.errors import UserError
from dwakd.folders import write_file

if TYPE_CHECKING:  # an optional package
    import altair as alt

_CHART = Markup('<figure class="chart">')


class Section(NamedTuple):
    """A part of a page with an entry in its table of contents."""

    title: str
    body: Markup


class Number(NamedTuple):
    """A cell of a table that is sorted by `value` and shows `text`; None is sorted last."""

    value: float | None
    text: str


Cell = str | Markup | Number


def join(*parts: Markup) -> Markup:
    """Return the parts one after the other."""
    return Markup("\n").join(parts)


def paragraph(text: str | Markup) -> Markup:
    """Return a paragraph."""
    return Markup("<p>{}</p>").format(text)


def data_text(text: str) -> Markup:
    """Return text of a model or of data: line breaks are kept, and each line has its own direction of writing."""
    return Markup('<div class="data" dir="auto">{}</div>').format(text)


def code(text: str) -> Markup:
    """Return preformatted text, for example of a file."""
    return Markup("<pre>{}</pre>").format(text)


def details(summary: str | Markup, body: Markup, *, is_open: bool = False) -> Markup:
    """Return a part that is shown after a click on its summary."""
    return Markup("<details{}><summary>{}</summary>{}</details>").format(" open" * is_open, summary, body)


def grid(parts: Sequence[Markup]) -> Markup:
    """Place charts or other parts side by side, one below the other on a phone."""
    return Markup('<div class="grid">{}</div>').format(join(*parts))


def facts(pairs: Sequence[tuple[str, str | Markup]]) -> Markup:
    """Return a list of names and values."""
    return Markup("<dl>{}</dl>").format(join(*(Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in pairs)))


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "") -> Markup:
    """Return a table that a click on a heading sorts; columns of numbers are aligned on the right."""
    return _macro("table", headings, rows, caption)


def searchable(parts: Sequence[Markup], label: str) -> Markup:
    """Return parts with a box that hides those which do not contain all words of the search.

    Args:
        parts: the parts, of which a search shows or hides each as a whole.
        label: what is searched, for example "Search the answers".
    """
    return _macro("searchable", parts, label)


def chart(drawn: alt.TopLevelMixin, description: str) -> Markup:
    """Return an Altair chart.

    Args:
        drawn: an `altair.Chart`, or charts in layers. A width of "container" fills the place of the chart.
        description: what the chart shows, for readers who cannot see it.

    Raises:
        ValueError: the chart's data contain NaN or inf, which JSON does not have.
    """
    spec = drawn.to_dict()
    spec.pop("$schema", None)
    data = htmlsafe_json_dumps(spec, allow_nan=False, separators=(",", ":"))
    return Markup(
        '{}<script type="application/json">{}</script><div role="img" aria-label="{}"></div></figure>'
    ).format(_CHART, data, description)


def require_charts() -> None:
    """Raise a UserError if a package that charts need is not installed; call it before anything slow."""
    missing = [package for package in ("altair", "vl_convert") if find_spec(package) is None]
    if missing:
        raise UserError(f'charts require the package {missing[0]}; install it with pip install "dwakd[report]"')


def render_page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Return the HTML of a page. Vega is embedded once, and only if there is a chart."""
    with_charts = any(_CHART in section.body for section in sections)
    scripts = [*([_vega()] if with_charts else []), _file("page.js")]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            sections=sections,
            style=Markup(_file("page.css")),
            scripts=[Markup(script) for script in scripts],
            policy=" ".join(f"'sha256-{digest}'" for digest in digests),
        )
    )


def write_page(path: Path, title: str, sections: Sequence[Section], *, subtitle: str = "") -> None:
    """Write the HTML of a page to a file, which appears complete or not at all."""
    write_file(path, render_page(title, sections, subtitle=subtitle).encode("utf-8", "replace"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dwakd.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _macro(name: str, *values: Any) -> Markup:
    macro: Any = getattr(_environment().get_template("parts.html").module, name)
    return macro(*values)


@cache
def _vega() -> str:
    """Return vega, vega-lite and vega-embed as one script."""
    require_charts()
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")
    assert "</script" not in bundle
    return bundle


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
