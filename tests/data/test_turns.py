"""Turns of a conversation: what is kept, what a template must show, and how arguments of calls are parsed."""

from typing import Any

import pytest

from dwakd.data.turns import (
    checked_text,
    content_keys,
    parse_arguments,
    read_options,
    read_turns,
    texts_to_show,
    usable,
)
from dwakd.errors import UserError


def nested(depth: int) -> list[Any]:
    """Return a list that contains a list, and so on."""
    return [nested(depth - 1)] if depth else []


def test_both_layouts_of_turns_are_read() -> None:
    """A turn that is read with another role or without its keys changes the prompt."""
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": [{"type": "text", "text": "b"}]}]
    openai = [{"role": "user", "content": "a", "tool_calls": []}, {"role": "assistant", "content": "b"}]
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_turns(shared, "messages") == read_turns(openai, "messages") == expected
    with pytest.raises(UserError, match=r"'messages'\[0\] must be an object"):
        read_turns(["a"], "messages")


def test_metadata_and_the_name_of_a_tool_need_not_be_shown() -> None:
    """Rows of public data sets would be refused because of identifiers, or lose a part that the model has to see."""
    assert content_keys({"role": "user", "content": "a", "id": 3, "weight": 1, "name": "Ann"}) == ["name"]
    assert content_keys({"role": "tool", "content": "4", "name": "sum", "status": "ok"}) == ["status"]


def test_texts_that_a_template_has_to_show() -> None:
    """A text that is missing from this list can be omitted by a template without an error."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "2 and 2</think>b", "tool_calls": [{"id": "x", "function": {"name": "f"}}]},
    ]
    options = {"documents": [{"title": "t"}], "enable_thinking": "no"}
    assert texts_to_show(turns, options) == [
        (0, "content", "a"), (1, "content", "b"), (1, "tool_calls", "f"), (-1, "documents", "t"),
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["[1]", "Oslo", '{"a": 1, "a": 2}'])
def test_only_objects_are_parsed_from_arguments(given: str) -> None:
    """Arguments that are parsed into anything but an object would be written in another form than they were given."""
    parsed: list[dict[str, Any]] = []
    calls = [{"arguments": '{"place": "Oslo"}'}, {"arguments": given}]
    assert parse_arguments(calls, parsed) == [{"arguments": {"place": "Oslo"}}, {"arguments": given}]
    assert parsed == [{"place": "Oslo"}]


def test_options_are_objects_or_their_json() -> None:
    """A column that only shares the name of an option belongs to the data set, unless the prompt is a conversation."""
    assert read_options({"tools": '[{"name": "a"}]'}, is_conversation=False) == {"tools": [{"name": "a"}]}
    assert read_options({"tools": "hammer"}, is_conversation=False) == {}
    assert read_options({}, is_conversation=True) == {}
    with pytest.raises(UserError, match="'tools' must be a list of objects"):
        read_options({"tools": "hammer"}, is_conversation=True)


def test_text_is_valid_unicode() -> None:
    """A lone surrogate cannot be tokenised."""
    assert checked_text("a", "'prompt'") == "a"
    with pytest.raises(UserError, match="'prompt' is not valid Unicode"):
        checked_text("\ud800", "'prompt'")


def test_nulls_inside_a_value_are_removed() -> None:
    """`datasets` writes null for keys that a row lacks. A chat template would print them."""
    assert usable([{"role": "user", "name": None, "tool_calls": [{"id": None}]}], "messages") == [
        {"role": "user", "tool_calls": [{}]}
    ]
    with pytest.raises(UserError, match="'messages' contains a value that is nested too deeply"):
        usable(nested(200), "messages")
