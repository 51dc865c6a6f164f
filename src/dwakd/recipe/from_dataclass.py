"""Make the options of a section from the dataclass of another library, so that they are written only once."""

import dataclasses
import enum
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, WithJsonSchema, create_model

from dwakd.validation import Section

Json = Annotated[JsonValue, WithJsonSchema({})]


def options_of(config: type[Any], limits: dict[str, Any] | None = None) -> type[Section]:
    """Make an options model from a dataclass: its fields with their types and descriptions.

    Fields whose values cannot be written in YAML are left out. Types in `limits` replace those of the dataclass.
    """
    hints = {**typing.get_type_hints(config, include_extras=True), **(limits or {})}
    fields: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        kind = _plain_type(hints[item.name])
        if item.init and kind not in (None, types.NoneType):
            unwritten = item.default is dataclasses.MISSING or isinstance(item.default, enum.Enum)
            default = None if unwritten else item.default
            fields[item.name] = (kind, Field(default, description=item.metadata.get("help")))
    return create_model(config.__name__, __base__=Section, **fields)


def _plain_type(hint: Any) -> Any:
    """Return the part of a type that YAML can write, or None; enumerations become literals."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(member.value for member in hint)]
    if origin in (typing.Union, types.UnionType):
        names = any(isinstance(part, type) and issubclass(part, enum.Enum) for part in arguments)
        parts = [_plain_type(part) for part in arguments if not (names and part is str)]
        return typing.Union[tuple(part for part in parts if part is not None)]  # noqa: UP007
    if origin is dict:
        return dict[str, Json]
    if origin is list:
        return list[_plain_type(arguments[0]) or Json]  # type: ignore[misc]
    return hint if origin in (Annotated, Literal, bool, int, float, str, types.NoneType) else None
