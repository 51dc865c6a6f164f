"""Test option models and the message about a value that is not allowed."""

from typing import Literal

import pytest
from pydantic import Field

from dwakd.errors import UserError
from dwakd.validation import Options, Section, parse


class Inner(Section):
    size: int = Field(1, ge=1)
    Kind: Literal["float"] = "float"

    @classmethod
    def owner(cls):
        return " of it"


class Sizes(Options):
    size: int = Field(1, ge=1)


class Outer(Section):
    inner: Inner | list[Inner] = Inner()
    rate: float | Literal["auto"] = "auto"
    by_name: dict[str, Inner] = Field({})
    sizes: Sizes = Sizes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"size": 0}}, "section.inner.size must be at least 1, got 0"),
        ({"inner": [{}, {"size": "x"}]}, "section.inner.2.size must be a whole number, got 'x'"),
        ({"inner": {"sizes": 1}}, "unknown option section.inner.sizes of it; did you mean size?"),
        ({"inner": {"Kind": "flot"}}, "section.inner.Kind must be 'float', got 'flot'; did you mean float?"),
        ({"rate": "x"}, "section.rate must be a number or 'auto', got 'x'"),
        ({"rate": float("nan")}, "section.rate must be a finite number or 'auto', got nan"),
        ({"by_name": {"float": {"size": True}}}, "section.by_name.float.size must be a whole number, got True"),
        ({"sizes": {"size": 0}}, "section.sizes.size must be at least 1, got 0"),
        ({"sizes": {"width": 1}}, "unknown option section.sizes.width; valid ones: size"),
        ({"sizes": {0.5: 1}}, "unknown option section.sizes.0.5; valid ones: size"),
        (3, "section must be a section with options, got 3"),
    ],
)
def test_the_sentence_names_the_option_and_what_is_allowed(values, message):
    """The message is one sentence that names the option, the value and the allowed values."""
    with pytest.raises(UserError) as caught:
        parse(Outer, values, "section.")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_options_raise_when_they_are_created():
    """Options of the library raise a UserError when they are created, not an error of pydantic."""
    with pytest.raises(UserError, match=r"^size must be at least 1, got 0$"):
        Sizes(size=0)
