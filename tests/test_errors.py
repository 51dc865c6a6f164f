"""Errors of other libraries within a sentence."""

import pytest

from dwakd.errors import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("bad value.\nand more"), "bad value"), (KeyError(), "KeyError"), (OSError("  \n"), "OSError")],
)
def test_the_reason_is_one_line(error, reason):
    """Messages of transformers are paragraphs, and some exceptions have none."""
    assert reason_of(error) == reason
