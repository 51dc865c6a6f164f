"""Errors of other libraries are quoted within a sentence."""

import pytest

from dwakd.errors import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("bad value.\nand more"), "bad value"), (KeyError(), "KeyError"), (OSError("  \n"), "OSError")],
)
def test_the_reason_is_one_line(error, reason):
    """Messages of transformers have several lines, and some exceptions have no message."""
    assert reason_of(error) == reason
