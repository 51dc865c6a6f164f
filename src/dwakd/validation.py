"""Options that are declared once as pydantic models, and the sentence that a user reads when one of them is wrong."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dwakd.errors import UserError

_WORDS = {
    "Input should be": "must be",
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid dictionary": "a section with options",
    "a valid list": "a list",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}


class Section(BaseModel):
    """Base class of options: values cannot be changed, and unknown names, other types and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Options(Section):
    """Options that users create themselves: an unknown or invalid one raises a UserError that begins with its name."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise user_error(error, type(self)) from None


SectionT = TypeVar("SectionT", bound=Section)


def parse(model: type[SectionT], values: Any, prefix: str = "", owner: str = "") -> SectionT:
    """Validate values that a user wrote.

    Args:
        model: the pydantic model of the values.
        values: the values by name.
        prefix: what messages write before the name of an option, such as "loss.".
        owner: what messages write after the name of an unknown option, such as " of method sft".

    Raises:
        UserError: one sentence on the first invalid value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise user_error(error, model, prefix, owner) from None


def user_error(error: ValidationError, model: type[BaseModel], prefix: str = "", owner: str = "") -> UserError:
    """Turn the first problem that pydantic found into one sentence that begins with the option's name."""
    problem = error.errors()[0]
    names = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    name = prefix + ".".join(names)
    if problem["type"] == "extra_forbidden":
        return unknown_option(name + owner, names[-1], list(model.model_fields))
    if problem["type"] == "missing":
        return UserError(f"{name} is missing")
    message = problem["msg"].removeprefix("Value error, ")
    if not names:
        return UserError(message)
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return UserError(f"{name} {message}, got {problem['input']!r}")


def unknown_option(name: str, word: object, valid: list[str]) -> UserError:
    """Return the error for an option that does not exist; it names the closest option and lists the others."""
    near = difflib.get_close_matches(str(word), valid, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    shown = ", ".join(valid) if 0 < len(valid) <= 40 else f"{len(valid) or 'none'} of them"
    return UserError(f"unknown option {name}; {hint}valid ones: {shown}")
