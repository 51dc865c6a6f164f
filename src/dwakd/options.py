"""Checks of options that a person writes: names and types, in the user's words."""

import enum
import types
import typing
from typing import Any

from dwakd.errors import UserError


def check_type(hint: Any, value: Any, name: str) -> None:
    """Refuse a value that is not of the annotated type; a whole number is good for a float, a bool for no number.

    Raises:
        UserError: names the option, the types it takes and what it got.
    """
    if not _fits(hint, value):
        raise UserError(f"{name} must be {_words(hint)}, got {value!r}")


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    kind = origin or hint
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if not (isinstance(kind, type) and issubclass(kind, enum.Enum))]
        return " or ".join(dict.fromkeys(_words(kind) for kind in kinds))
    if hint is types.NoneType:
        return "nothing"
    if (typing.get_origin(hint) or hint) is dict:
        return "a section with options"
    if typing.get_origin(hint) is list:
        return f"a list of {_words(typing.get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))
