"""Test the HTML of standalone pages."""

import json
import re

import altair as alt
import pytest
from markupsafe import Markup

from dwakd.errors import UserError
from dwakd.report import page

HOSTILE = '</script><script>alert("x")</script> & <b>'


def line_chart(values):
    return alt.Chart(alt.Data(values=values)).mark_line().encode(x="step:Q", y="loss:Q", color="run:N")


def test_text_is_escaped_everywhere():
    """Text of a model that looks like HTML is shown as text; as HTML it could run scripts in the reader's browser."""
    points = [{"step": 0, "loss": 1.0, "run": HOSTILE}]
    parts = [
        page.paragraph(HOSTILE),
        page.data_text(HOSTILE),
        page.code(HOSTILE),
        page.details(HOSTILE, page.code(HOSTILE)),
        page.facts([(HOSTILE, HOSTILE)]),
        page.table([HOSTILE], [[HOSTILE], [page.Number(1, HOSTILE)]], caption=HOSTILE),
        page.searchable([page.data_text(HOSTILE)], HOSTILE),
        page.chart(line_chart(points), HOSTILE),
    ]
    html = page.render_page(HOSTILE, [page.Section(HOSTILE, page.join(*parts))], subtitle=HOSTILE)
    assert 'alert("x")' not in html
    assert "<b>" not in html
    assert html.count("<script>") == 2
    [spec] = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert json.loads(spec)["data"]["values"] == points


def test_vega_is_embedded_once_and_only_for_charts():
    """A page with two charts has one copy of vega, and a page without a chart none, so that it is small."""
    drawn = page.chart(line_chart([{"step": 0, "loss": 1.0}]), "loss")
    assert page.render_page("a", [page.Section("b", page.grid([drawn, drawn]))]).count("window.vegaEmbed=") == 1
    assert len(page.render_page("a", [page.Section("b", page.paragraph("c"))])) < 20_000


def test_a_chart_refuses_nan():
    """NaN is not JSON: the browser would draw none of the charts."""
    with pytest.raises(ValueError, match="JSON compliant"):
        page.chart(line_chart([{"step": 0, "loss": float("nan")}]), "loss")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "vl_convert" else object())
    with pytest.raises(UserError, match=r'vl_convert; install it with pip install "dwakd\[report\]"'):
        page.require_charts()


def test_a_page_is_written_whatever_the_text(tmp_path):
    """A lone surrogate, which JSON files of answers can contain, is replaced."""
    page.write_page(tmp_path / "page.html", "a", [page.Section("b", page.data_text("\ud800 שלום"))])
    assert Markup("? שלום") in (tmp_path / "page.html").read_text(encoding="utf-8")
