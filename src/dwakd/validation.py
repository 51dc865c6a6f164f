"""Options that are declared once as pydantic models, and the sentence that a user reads when one of them is wrong."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dwakd.errors import UserError

_WORDS = {
    "Input should be": "must be",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}


class Options(BaseModel):
    """Base class: values cannot be changed, and an unknown or invalid one raises a UserError that begins with its name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise user_error(error, list(type(self).model_fields)) from None


def user_error(error: ValidationError, known: list[str]) -> UserError:
    """Turn the first problem that pydantic found into one sentence that begins with the option's name."""
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    if problem["type"] == "extra_forbidden":
        return unknown_option(name, name, known)
    if problem["type"] == "missing":
        return UserError(f"{name} is missing")
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
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
