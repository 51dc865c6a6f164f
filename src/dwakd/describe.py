"""A method explained on the terminal: what it is, and its options with defaults, meanings and allowed values."""

from __future__ import annotations

import inspect
import re
import types
import typing

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dwakd.errors import UserError
from dwakd.losses import METHODS, ModelPair, Widths, build_loss, method_class, method_options

_SECTION = re.compile(r"^(Args|Returns|Raises|References|Examples):$", re.MULTILINE)
_ANY_WIDTHS = Widths(1, 1, 1, 1)


def methods_table() -> Table:
    """Every method: whether it needs a teacher, and what it does."""
    table = Table("method", "teacher", "what it does", box=box.HORIZONTALS, show_edge=False)
    for word, method in METHODS.items():
        module = inspect.getdoc(inspect.getmodule(method)) or ""
        table.add_row(word, "yes" if method.needs_teacher else "no", module.splitlines()[0])
    table.caption, table.caption_justify = "dwakd methods NAME lists a method's options", "left"
    return table


def method_page(name: str) -> Group:
    """A method's formula and remarks, its options as a table, and its references.

    Raises:
        UserError: unknown method.
    """
    text = inspect.getdoc(method_class(name)) or ""
    intro, *rest = _SECTION.split(text)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    parts: list[Text | Table] = [Text(f"{name}\n", style="bold"), Text(_unwrapped(intro))]
    options = method_options(name)
    if options:
        meanings = _entries(sections.get("Args", ""))
        table = Table(box=box.HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0))
        for heading in ("option", "default", "meaning", "allowed"):
            table.add_column(heading, no_wrap=heading == "option", max_width=20 if heading == "allowed" else None)
        for option, default in options.items():
            meaning = meanings.get(option, "")
            table.add_row(option, _yaml(default), Text(meaning), allowed_values(name, option))
        parts += [Text(f"\nOptions, in the recipe's loss section or as loss.{next(iter(options))}=VALUE:\n"), table]
    else:
        parts.append(Text("\nNo options."))
    if "References" in sections:
        parts.append(Text(f"\nReferences: {_unwrapped(inspect.cleandoc(sections['References']))}"))
    return Group(*parts)


def allowed_values(method: str, option: str) -> str:
    """What an option takes, in the words with which the method itself refuses something else."""
    hint = typing.get_type_hints(METHODS[method].__init__)[option]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not types.NoneType]
    if bool in kinds:
        return "true, false"
    words = "any text" if str in kinds else "any number"
    try:
        build_loss(method, {option: "?" if str in kinds else -1}, widths=_ANY_WIDTHS, pair=ModelPair.smallest())
    except UserError as error:
        refusal = re.search(r"valid ones: (.+)$|must be a number (.+), got", str(error).rstrip("."))
        if refusal:
            words = refusal[1] or refusal[2]
    whole = "whole, " if kinds == [int] else ""
    return f"{whole}{words}{' or null' if type(None) in typing.get_args(hint) else ''}"


def _entries(section: str) -> dict[str, str]:
    """The entries of a docstring's section by name."""
    entries: dict[str, str] = {}
    for line in inspect.cleandoc(section).splitlines():
        if start := re.match(r"(\w+): (.*)", line):
            name = start[1]
            entries[name] = start[2]
        elif entries and line.strip():
            entries[name] += f" {line.strip()}"
    return entries


def _unwrapped(text: str) -> str:
    """Paragraphs in one line each, for the terminal to wrap."""
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else " ".join(paragraph.split())  # formulas keep their lines
        for paragraph in text.strip().split("\n\n")
    )


def _yaml(value: object) -> str:
    """A default as a recipe would write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
