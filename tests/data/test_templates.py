"""Test the table of prompt templates and the texts that list their names."""

import pytest

from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.data.templates import TEMPLATES, check_template
from dwakd.evaluation.options import RowOptions
from dwakd.recipe.recipe import recipe_schema


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_contains_the_instruction_and_the_input(name: str) -> None:
    """The name of every template selects its texts, which contain the instruction and, if there is one, the input."""
    check_template(name)
    alone, with_input = (Prompts(name, None).render(Example(0, "Add.", text)) for text in ("", "1 2"))
    assert "Add." in alone
    assert "Add." in with_input
    assert "1 2" in with_input


def test_help_and_schema_list_every_template() -> None:
    """`dwakd eval --help` and the JSON Schema of a recipe list all names."""
    shown = str(RowOptions.model_fields["template"].description)
    schema = str(recipe_schema()["$defs"]["DataSection"]["properties"]["template"]["description"])
    for name in (*TEMPLATES, "chat"):
        assert name in shown
        assert name in schema
