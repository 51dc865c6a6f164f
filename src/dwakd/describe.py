"""Descriptions of the methods for the terminal, generated from their docstrings and from the fields of their options."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dwakd.losses import METHODS, SUM, method_class

_SECTION = re.compile(r"^(Args|Raises|References):$", re.MULTILINE)
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def methods_table() -> Table:
    """List the methods: whether each needs a teacher, and what it does."""
    table = Table("method", "teacher", "what it does", box=box.HORIZONTALS, show_edge=False)
    for word in (*METHODS, SUM):
        method = method_class(word)
        module = inspect.getdoc(inspect.getmodule(method)) or ""
        table.add_row(word, "yes" if method.options_type.needs_teacher else "no", module.splitlines()[0])
    table.caption, table.caption_justify = "dwakd methods NAME lists a method's options", "left"
    return table


def method_page(name: str) -> Group:
    """Show a method's formula, its options as a table, and its references; raise UserError if it is unknown."""
    intro, sections = method_sections(name)
    parts: list[Text | Table] = [Text(f"{name}\n", style="bold"), Text(_unwrapped(intro))]
    if rows := option_rows(name):
        table = Table(box=box.HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0))
        for heading in ("option", "default", "meaning", "allowed"):
            table.add_column(heading, no_wrap=heading == "option", max_width=20 if heading == "allowed" else None)
        for option, default, meaning, allowed in rows:
            table.add_row(option, default, Text(meaning), allowed)
        parts += [Text(f"\nOptions, in the recipe's loss section or as loss.{rows[0][0]}=VALUE:\n"), table]
    else:
        parts.append(Text("\nNo options."))
    if "References" in sections:
        parts.append(Text(f"\nReferences: {_unwrapped(sections['References'])}"))
    return Group(*parts)


def method_sections(name: str) -> tuple[str, dict[str, str]]:
    """Split the docstring of a method into its introduction and its sections by name; raise UserError if it is unknown."""
    intro, *rest = _SECTION.split(inspect.getdoc(method_class(name)) or "")
    return intro.strip(), dict(zip(rest[::2], map(inspect.cleandoc, rest[1::2]), strict=True))


def option_rows(name: str) -> list[tuple[str, str, str, str]]:
    """List name, default, meaning and allowed values of each option of a method; raise UserError if it is unknown."""
    kind = method_class(name).options_type
    properties = kind.model_json_schema()["properties"]
    rows = []
    for option, field in kind.model_fields.items():
        if option != "method":
            default = "required" if field.is_required() else json.dumps(field.default).strip('"')
            rows.append((option, default, field.description or "", allowed_values(properties[option])))
    return rows


def allowed_values(schema: dict[str, Any]) -> str:
    """Describe the values that an option allows, from the JSON schema of its field."""
    if "anyOf" in schema:
        return " or ".join(allowed_values(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if schema["type"] == "boolean":
        return "true, false"
    form = ",.0f" if schema["type"] == "integer" else "g"
    limits = [f"{words} {schema[name]:{form}}" for name, words in _LIMITS.items() if schema.get(name, 1e30) < 1e30]
    kind = {"integer": "a whole number", "number": "a number", "null": "null", "array": "a list"}[schema["type"]]
    return " ".join([kind, " and ".join(limits)]).strip()


def _unwrapped(text: str) -> str:
    """Write each paragraph in one line, for the terminal to wrap; formulas keep their lines."""
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else " ".join(paragraph.split())
        for paragraph in text.strip().split("\n\n")
    )
