"""Recipe files: YAML that is read strictly, and options that the command line overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dwakd.errors import UserError, reason_of

RECIPE_FILE = "dwakd-recipe.yaml"
"""The resolved recipe in a run's folder."""
_INTEGER = "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """Read 5e-4 as a number, and `no` and 010 as text, and refuse repeated keys.

    YAML 1.1 reads 5e-4 as a string, `no` as false, 010 as 8 and 1:30 as 90, and uses the last of two equal keys.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name)
        first: [(tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:bool", _INTEGER)]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Refuse a scalar that its type does not allow, such as the date 2024-99-99, and numbers that cannot be printed."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # refuses 0xfff... of more than 4,300 decimal digits, which no message could contain
            return value
        except (ValueError, LookupError, AttributeError) as error:  # of int() and of PyYAML's own parsers
            problem = (
                f"{node.value!r:.40} is not a valid {node.tag.rpartition(':')[2]}: correct it, or quote it as text"
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _INTEGER, re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$", re.ASCII), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text, read strictly; raise YAMLError for every text that cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError, TypeError) as error:  # PyYAML does not check \U, !!map and !!set
        raise yaml.YAMLError(f"a tag or an escape sequence does not fit its value ({reason_of(error)})") from error


def _read(path: Path) -> tuple[Any, str]:
    """Return the content of a YAML file and "", or None and what is wrong with it in one line."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8")), ""
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return None, _fault(error)


def _fault(error: Exception) -> str:
    """Describe in one line what is wrong with a YAML text, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the sections of a recipe file and apply overrides, without validating their options.

    Raises:
        UserError: there is no such file, it is not valid YAML, or an override cannot be applied.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a recipe, which is a YAML file")
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    content, fault = _read(path)
    if fault:
        raise UserError(f"recipe {path} is not valid YAML: {fault}")
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must contain sections such as student, teacher and data")
    for override in overrides:
        apply_override(content, override)
    return content


def read_saved_recipe(path: Path, *, fix: str) -> dict[str, Any]:
    """Read the sections of the recipe in a run's folder; raise UserError, which ends with `fix`, if it is damaged."""
    content, fault = _read(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise UserError(f"{path} is damaged ({fault or 'it has no section data'}); {fix}")
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted option of nested sections, `section.name=value`, with the value read as YAML."""
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"override {override!r} must look like section.option=value, for example loss.temperature=4")
    try:
        set_option(content, name, parse_yaml(value))
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r:.80}: the value is not valid YAML ({_fault(error)})") from error
    except UserError as error:
        raise UserError(f"override {override!r}: {error}") from None


def set_option(content: Any, name: str, value: Any) -> None:
    """Set one dotted option of nested sections. Items of lists count from 1: loss.2.weight."""
    section, place = "", content
    for key in name.split("."):
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        if not isinstance(place, dict | list):
            raise UserError(f"{section} is no section here; edit the recipe")
        content, index = place, key if isinstance(place, dict) else _index(section, place, key)
        section, place = f"{section}.{key}".lstrip("."), content[index]
    content[index] = value


def _index(name: str, items: list[Any], key: str) -> int:
    if not (key.isdecimal() and 1 <= int(key) <= len(items)):
        raise UserError(f"{name} is a list here, of {len(items)}: write {name}.1 for the first, and so on")
    return int(key) - 1
