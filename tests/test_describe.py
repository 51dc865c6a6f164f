"""Test `dwakd methods`: it explains every option of every method."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dwakd.describe import allowed_values, method_page, methods_table
from dwakd.losses import METHODS
from dwakd.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def shown(page) -> str:
    """Return a page as text."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(page)
    return console.export_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_meaning_and_allowed_values(method):
    """Every option has a description and allowed values."""
    fields = METHODS[method].options_type.model_fields
    page = shown(method_page(method))
    for name, field in fields.items():
        if name != "method":
            assert (field.description or "missing").split()[0] in page, name
            assert name in page


def test_the_sum_is_listed_and_explained():
    """The sum of methods is in the list of methods and has a page."""
    assert "Sum: add the losses" in shown(methods_table())
    page = shown(method_page("sum"))
    assert "losses  required" in page
    assert "a list" in page


def test_allowed_values_are_those_of_the_field():
    """The allowed values are generated from the field of the option."""
    properties = METHODS["dskd"].options_type.model_json_schema()["properties"]
    assert allowed_values(properties["kd_rate"]) == "a number at least 0 and at most 1"
    assert allowed_values(properties["accuracy_mask"]) == "true, false or null"
    assert allowed_values(properties["student_divergence"]).startswith("forward_kl, reverse_kl, ")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_page_recipe_and_test(method):
    """Every method has a page, a recipe and a test file, as CONTRIBUTING.md requires."""
    assert (ROOT / "docs" / "methods" / f"{method}.md").is_file()
    assert load_recipe(ROOT / "recipes" / "methods" / f"{method}.yaml").method == method
    assert (ROOT / "tests" / "losses" / f"test_{method}.py").is_file()


def test_the_method_shown_to_contributors_is_the_real_one():
    """The diff in CONTRIBUTING.md agrees with the files of the method `sft`."""
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in ("src/dwakd/losses/sft.py", "tests/losses/test_sft.py"):
        (block,) = re.findall(rf"^\+\+\+ b/{path}\n((?:\+.*\n)+)", shown, re.M)
        assert re.sub(r"^\+", "", block, flags=re.M) == (ROOT / path).read_text(encoding="utf-8")


def test_formulas_keep_their_lines():
    """Each equation of a formula stays on its own line."""
    lines = shown(method_page("sra")).splitlines()
    assert [line.split("=")[0].strip() for line in lines if line.lstrip().startswith(("L_span", "L_geo", "L_kd"))][
        :3
    ] == [
        "L_span",
        "L_geo",
        "L_kd",
    ]
