"""Write standalone HTML pages: every script and style is embedded, and a page makes no network request.

A page is a title and sections, whose bodies are made by the helpers of this module, which escape all text:

    body = join(paragraph("The loss by step."), chart(drawn_with_altair, "loss by step"), table(["run", "loss"], rows))
    write_page(Path("report.html"), "Report", [Section("Loss", body)])

The colours of the light and the dark theme are variables in page.css. The text of charts has the colour of the page's text.
The Content-Security-Policy allows the page's own two scripts only, so text that was not escaped could not run either.
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

from jinja2 import Environment, PackageLoader
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from dwakd.errors import UserError
from dwakd.folders import write_file

if TYPE_CHECKING:  # an optional package
    import altair as alt

_TEMPLATES = Environment(
    loader=PackageLoader("dwakd.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_PARTS: Any = _TEMPLATES.get_template("parts.html").module
_CHART = Markup(
    '<figure class="chart"><script type="application/json">{}</script><div role="img" aria-label="{}"></div></figure>'
)

paragraph = Markup("<p>{}</p>").format
heading = Markup("<h3>{}</h3>").format
code = Markup("<pre>{}</pre>").format
details = Markup("<details><summary>{}</summary>{}</details>").format
"""A part that is shown after a click on its summary, which is the first argument."""
data_text = Markup('<div class="data" dir="auto">{}</div>').format
"""Text of a model or of data: line breaks are kept, and each line has its own direction of writing."""


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


def grid(parts: Sequence[Markup]) -> Markup:
    """Place charts or other parts side by side, one below the other on a phone."""
    return Markup('<div class="grid">{}</div>').format(join(*parts))


def facts(pairs: Sequence[tuple[str, str | Markup]]) -> Markup:
    """Return a list of names and values."""
    return Markup("<dl>{}</dl>").format(join(*(Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in pairs)))


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "") -> Markup:
    """Return a table that a click on a heading sorts; columns of numbers are aligned on the right."""
    return _PARTS.table(headings, rows, caption)


def searchable(parts: Sequence[Markup], label: str) -> Markup:
    """Return parts below a box with a label, which hides the parts that do not contain all words of the search."""
    return _PARTS.searchable(parts, label)


def chart(drawn: alt.TopLevelMixin, description: str) -> Markup:
    """Return an Altair chart with a description for readers who cannot see it.

    A width of "container" fills the place of the chart. Data in CSV are not possible, because vega reads them with eval.

    Raises:
        ValueError: the chart's data contain NaN or inf, which JSON does not have.
    """
    spec = {name: value for name, value in drawn.to_dict().items() if name != "$schema"}
    return _CHART.format(htmlsafe_json_dumps(spec, allow_nan=False, separators=(",", ":")), description)


def require_charts() -> None:
    """Raise a UserError if a package that charts need is not installed; call it before anything slow."""
    missing = [package for package in ("altair", "vl_convert") if find_spec(package) is None]
    if missing:
        raise UserError(f'charts require the package {missing[0]}; install it with pip install "dwakd[report]"')


def render_page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Return the HTML of a page. Vega is embedded once, and only if there is a chart."""
    style, script = (resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    scripts = [_vega(), script] if any('<figure class="chart">' in section.body for section in sections) else [script]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return _TEMPLATES.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{digest}'" for digest in digests),
    )


def write_page(path: Path, title: str, sections: Sequence[Section], *, subtitle: str = "") -> None:
    """Write the HTML of a page to a file, which appears complete or not at all."""
    write_file(path, render_page(title, sections, subtitle=subtitle).encode("utf-8", "replace"))


@cache
def _vega() -> str:
    """Return vega, vega-lite and vega-embed as one script."""
    require_charts()
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")
