"""Test that options are validated once, when they are created, and that the error names the option."""

from typing import Any

import pytest
from pydantic import ValidationError

from dwakd.errors import UserError
from dwakd.evaluation.options import EvalOptions, GenerationOptions, Options, RowOptions

INVALID: list[tuple[type[Options], dict[str, Any], str]] = [
    (GenerationOptions, {"seed": -1}, "seed"),
    (GenerationOptions, {"seed": "x"}, "seed"),
    (GenerationOptions, {}, "seed"),
    (GenerationOptions, {"seed": 0, "temperature": 0.0}, "temperature"),
    (GenerationOptions, {"seed": 0, "temperature": float("nan")}, "temperature"),
    (GenerationOptions, {"seed": 0, "temperature": float("inf")}, "temperature"),
    (GenerationOptions, {"seed": 0, "top_p": 1.5}, "top_p"),
    (GenerationOptions, {"seed": 0, "top_p": 0}, "top_p"),
    (GenerationOptions, {"seed": 0, "max_new_tokens": 0}, "max_new_tokens"),
    (GenerationOptions, {"seed": 0, "batch_size": 0}, "batch_size"),
    (GenerationOptions, {"seed": 0, "no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    (EvalOptions, {"seeds": 0}, "seeds"),
    (EvalOptions, {"temperatures": []}, "temperatures"),
    (EvalOptions, {"temperatures": [1.0, 0.0]}, "temperatures"),
    (EvalOptions, {"temperatures": [0.7, 1.0, 0.7]}, "temperatures"),
    (EvalOptions, {"temperatures": 0.7}, "temperatures"),
    (EvalOptions, {"decoding": "beam"}, "decoding"),
    (EvalOptions, {"decoding": "minillm", "temperatures": [0.7]}, "decoding"),
    (EvalOptions, {"decoding": "minillm", "top_p": 0.9}, "decoding"),
    (EvalOptions, {"seeds": True}, "seeds"),
    (EvalOptions, {"seeds": 2.5}, "seeds"),
    (EvalOptions, {"max_length": 0}, "max_length"),
    (RowOptions, {"limit": 0}, "limit"),
    (RowOptions, {"prompt": 3}, "prompt"),
]


@pytest.mark.parametrize(("options", "values", "name"), INVALID)
def test_values_out_of_range_are_refused(options: type[Options], values: dict[str, Any], name: str) -> None:
    """Values out of range are refused with the name of the option."""
    with pytest.raises(UserError, match=rf"^{name} ") as caught:
        options(**values)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_options_are_refused_with_the_nearest_name() -> None:
    """An unknown option is refused, and the message suggests the most similar name."""
    with pytest.raises(UserError, match=r"max_new_token;.* max_new_tokens"):
        EvalOptions(max_new_token=3)


def test_options_cannot_be_changed() -> None:
    """Options cannot be changed after they were validated."""
    with pytest.raises(ValidationError):
        EvalOptions().seeds = 0  # type: ignore[misc]


def test_passes() -> None:
    """The default seeds are 10 to 50, and at least one pass is required."""
    seeds = [generation.seed for generation in EvalOptions().passes()]
    assert seeds == [10, 20, 30, 40, 50, None]
    (only,) = EvalOptions(do_sample=False, temperatures=[0.5], max_new_tokens=3).passes()
    assert only == GenerationOptions(seed=None, max_new_tokens=3)
    both = EvalOptions(seeds=2, temperatures=[1.0, 0.7]).passes()
    assert [(one.seed, one.temperature) for one in both[:-1]] == [(10, 1.0), (20, 1.0), (10, 0.7), (20, 0.7)]
    assert both[-1].seed is None
    assert {one.no_repeat_ngram_size for one in EvalOptions(decoding="minillm").passes()} == {6}
    with pytest.raises(UserError, match="greedy"):
        EvalOptions(do_sample=False, greedy=False)


def test_only_what_is_given_changes_how_rows_are_read() -> None:
    """Options that are not given keep the values that the model was trained with."""
    rows = RowOptions(bos="never", limit=3)
    assert rows.rendering(template="plain", bos="auto") == {"template": "plain", "bos": "never"}
    assert rows.reading() == {"prompt": None, "response": None, "input": None, "limit": 3}
