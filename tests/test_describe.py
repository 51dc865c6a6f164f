"""`dwakd methods`: every option of every method is explained."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dwakd.config import load_recipe
from dwakd.describe import _entries, allowed_values, method_page
from dwakd.losses import METHODS, method_class, method_options

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_meaning_and_allowed_values(method):
    """An option without a word about it is one that users set by guessing."""
    method_page(method)
    doc = method_class(method).__doc__ or ""
    meanings = _entries(doc.partition("Args:\n")[2].partition("\n\n")[0])
    for option in method_options(method):
        assert meanings.get(option), option
        assert not allowed_values(method, option).startswith("any"), option


def test_allowed_values_are_those_the_method_checks():
    """A second list of them would soon differ from what is accepted."""
    assert allowed_values("dskd", "kd_rate") == "between 0 and 1"
    assert allowed_values("dskd", "accuracy_mask") == "true, false"
    assert allowed_values("dskd", "student_divergence").startswith("forward_kl, reverse_kl, ")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_page_recipe_and_test(method):
    """What CONTRIBUTING asks of the next method must hold for those that are there."""
    assert f"\n## {method}\n" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"| `{method}` |" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert load_recipe(ROOT / "recipes" / "methods" / f"{method}.yaml").method == method
    assert (ROOT / "tests" / "losses" / f"test_{method}.py").is_file()


def test_the_method_shown_to_contributors_is_the_real_one():
    """A diff in a text goes stale unnoticed."""
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in ("src/dwakd/losses/sft.py", "tests/losses/test_sft.py"):
        (block,) = re.findall(rf"^\+\+\+ b/{path}\n((?:\+.*\n)+)", shown, re.M)
        assert re.sub(r"^\+", "", block, flags=re.M) == (ROOT / path).read_text(encoding="utf-8")


def test_formulas_keep_their_lines():
    """Three equations on one line are none."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(method_page("sra"))
    lines = console.export_text().splitlines()
    assert [line.split("=")[0].strip() for line in lines if line.lstrip().startswith(("L_span", "L_geo", "L_kd"))][
        :3
    ] == [
        "L_span",
        "L_geo",
        "L_kd",
    ]
