"""Test that errors of other libraries are quoted within one sentence."""

import pytest

from dwakd.errors import UserError, explained, reason_of
from dwakd.recipe.recipe import recipe_from_dict


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("bad value.\nand more"), "bad value"), (KeyError(), "KeyError"), (OSError("  \n"), "OSError")],
)
def test_the_reason_is_one_line(error, reason):
    """The reason is one line, also for messages with several lines and for exceptions without a message."""
    assert reason_of(error) == reason


def test_any_exception_becomes_a_user_error():
    """Any exception inside the block becomes a UserError, which the command line prints as one sentence."""
    what, sentence = "a.json: cannot be read", r"^a\.json: cannot be read \(PermissionError: Permission denied\)$"
    with pytest.raises(UserError, match=sentence), explained(what):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(UserError, match=r"^the row is empty$"), explained(what):
        raise UserError("the row is empty")


def test_a_lone_surrogate_in_a_message_is_escaped():
    """pydantic encodes the messages of validators, so that a surrogate in the name of an option raised UnicodeEncodeError."""
    recipe = {"student": {"model": "s"}, "data": {"train": "x"}, "loss": {"method": "sft"}}
    for section in ("generate", "training", "evaluation"):
        with pytest.raises(UserError, match=r"\\ud800"):
            recipe_from_dict({**recipe, section: {"\ud800": 1}})
