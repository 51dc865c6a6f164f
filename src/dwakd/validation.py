"""Options that are declared once as pydantic models, and the sentence that a user reads when one of them is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dwakd.errors import UserError
from dwakd.trl_names import instead_of

_WORDS = {
    r"^(Value error, |Input )(should be )?": "",
    "a valid (dictionary|object).*": "a section with options",
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid list": "a list",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
_MAIN = {"student": "model", "teacher": "model", "data": "train", "loss": "method"}
"""The option that users mean who write its value in place of the section."""


class _UnknownNameError(ValueError):
    def __init__(self, name: object, owner: str, valid: list[str]) -> None:
        self.name, self.owner, self.valid = str(name), owner, valid


class Section(BaseModel):
    """Base class of options: values cannot be changed, and unknown names, other types and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def owner(cls) -> str:
        """Return what messages write after the name of an unknown option, such as " of method sft"."""
        return ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_names(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise _UnknownNameError(name, cls.owner(), list(cls.model_fields))
        return values


class Options(Section):
    """Options that users create themselves: an unknown or invalid one raises a UserError that begins with its name."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise user_error(error, values) from None

    # pydantic otherwise calls __init__ for a section inside a recipe, whose name would then be missing in messages
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


SectionT = TypeVar("SectionT", bound=Section)


def parse(model: type[SectionT], values: Any, prefix: str = "", context: object = None) -> SectionT:
    """Validate values that a user wrote.

    Args:
        model: the pydantic model of the values.
        values: the values by name.
        prefix: what messages write before the name of an option, such as "loss.".
        context: passed to the validators of the model.

    Raises:
        UserError: one sentence on the first invalid value.
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        raise user_error(error, values, prefix) from None


def user_error(error: ValidationError, values: Any, prefix: str = "") -> UserError:
    """Turn the first problem that pydantic found in `values` into one sentence that begins with the option's name.

    A UserError that a validator raised is returned as it is. `prefix` is that of `parse`.
    """
    problems = [(_path(item, values), item) for item in error.errors()]
    first = problems[0][0]
    # Of a union, pydantic reports the problems of each choice. The choice that was meant has the deepest one.
    path = max((path for path, _ in problems if path[: len(first)] == first), key=len)
    items = [item for other, item in problems if other == path]
    kind, found, context = items[0]["type"], items[0]["input"], items[0].get("ctx", {})
    name = (prefix + ".".join(path)).rstrip(".")
    cause = context.get("error")
    if isinstance(cause, UserError):
        return UserError(str(cause))
    if isinstance(cause, _UnknownNameError):
        name = f"{name}.{cause.name}".lstrip(".") + cause.owner
        return unknown_option(name, cause.name, cause.valid, method=bool(cause.owner))
    if kind in ("missing", "union_tag_not_found"):
        return UserError(f"{name} is missing")
    if kind == "value_error" and isinstance(found, dict | BaseModel):  # of several options, which the message names
        return UserError(f"{name}: {_words(items[0])}".removeprefix(": "))
    if kind == "union_tag_invalid":
        name, found = f"{name}.{context['discriminator'].strip(chr(39))}", context["tag"]
    allowed = " or ".join(dict.fromkeys(_words(item) for item in items))
    must = "" if allowed.startswith("must") else "must be "
    if isinstance(found, str) and name in _MAIN and "section" in allowed:
        return UserError(f"{name} must be {allowed}, got {found!r}; write {name}: {{{_MAIN[name]}: {found}}}")
    near = difflib.get_close_matches(str(found), re.findall("'(.+?)'", allowed), n=1)
    return UserError(f"{name} {must}{allowed}, got {found!r}" + (f"; did you mean {near[0]}?" if near else ""))


def unknown_option(name: str, word: str, valid: Sequence[str], *, method: bool = False) -> UserError:
    """Return the error for an option that does not exist; it names the closest option and lists the others.

    For a name of TRL, it says what to write instead, unless it is an option of a method.
    """
    if (instead := instead_of(word)) and not method:
        return UserError(f"{name} is not an option of dwakd: {instead}")
    return unknown_name(f"option {name}", word, valid)


def unknown_name(what: str, word: str, valid: Sequence[str]) -> UserError:
    """Return the error for a name that does not exist; it names the closest one and lists the others."""
    near = difflib.get_close_matches(str(word), valid, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    shown = ", ".join(valid) if 0 < len(valid) <= 40 else f"{len(valid) or 'none'} of them"
    return UserError(f"unknown {what}; {hint}valid ones: {shown}")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse the value of an option that is not one of the choices."""
    if value not in choices:
        raise UserError(f"{option} {value!r} is unknown: use {' or '.join(choices)}")


def _path(problem: Any, values: Any) -> list[str]:
    """Return the names that lead to a problem, without pydantic's labels of unions; items of lists count from 1."""
    path = []
    for part in problem["loc"]:
        if isinstance(values, list) and isinstance(part, int):
            values = values[part]
            path.append(str(part + 1))
        elif isinstance(values, dict) and part in values:
            values = values[part]
            path.append(str(part))
    if problem["type"] == "union_tag_not_found":
        path.append(problem["ctx"]["discriminator"].strip("'"))
    return [*path, str(problem["loc"][-1])] if problem["type"] == "missing" else path


def _words(problem: Any) -> str:
    """Write pydantic's message in the words of a recipe."""
    message = problem["msg"]
    if problem["type"] == "union_tag_invalid":
        return "one of " + message.partition("expected tags: ")[2]
    for theirs, ours in _WORDS.items():
        message = re.sub(theirs, ours, message)
    return message
