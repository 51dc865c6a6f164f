"""Test turns of conversations: kept keys, texts that a template must show, and arguments of tool calls."""

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
    """Turns with role and content, and those with from and value, are read with all their keys."""
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": [{"type": "text", "text": "b"}]}]
    openai = [{"role": "user", "content": "a", "tool_calls": []}, {"role": "assistant", "content": "b"}]
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_turns(shared, "messages") == read_turns(openai, "messages") == expected
    with pytest.raises(UserError, match=r"'messages'\[0\] must be an object"):
        read_turns(["a"], "messages")


def test_metadata_and_the_name_of_a_tool_need_not_be_shown() -> None:
    """Metadata of turns and the name of a tool need not occur in the prompt, but other keys must."""
    assert content_keys({"role": "user", "content": "a", "id": 3, "weight": 1, "name": "Ann"}) == ["name"]
    assert content_keys({"role": "tool", "content": "4", "name": "sum", "status": "ok"}) == ["status"]


def test_texts_that_a_template_has_to_show() -> None:
    """The texts that a template must show are collected from turns and options."""
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
    """Arguments of calls are parsed only if they are a JSON object. Others keep the form in which they were given."""
    parsed: list[dict[str, Any]] = []
    calls = [{"arguments": '{"place": "Oslo"}'}, {"arguments": given}]
    assert parse_arguments(calls, parsed) == [{"arguments": {"place": "Oslo"}}, {"arguments": given}]
    assert parsed == [{"place": "Oslo"}]


def test_options_are_objects_or_their_json() -> None:
    """Template options are objects or their JSON. In rows without a conversation, other columns of these names are ignored."""
    assert read_options({"tools": '[{"name": "a"}]'}, is_conversation=False) == {"tools": [{"name": "a"}]}
    assert read_options({"tools": "hammer"}, is_conversation=False) == {}
    assert read_options({}, is_conversation=True) == {}
    with pytest.raises(UserError, match="'tools' must be a list of objects"):
        read_options({"tools": "hammer"}, is_conversation=True)


def test_text_is_valid_unicode() -> None:
    """A text with a lone surrogate, which cannot be tokenised, is refused."""
    assert checked_text("a", "'prompt'") == "a"
    with pytest.raises(UserError, match="'prompt' is not valid Unicode"):
        checked_text("\ud800", "'prompt'")


def test_nulls_inside_a_value_are_removed() -> None:
    """Nulls, which `datasets` inserts for missing keys and a template would print, are removed."""
    assert usable([{"role": "user", "name": None, "tool_calls": [{"id": None}]}], "messages") == [
        {"role": "user", "tool_calls": [{}]}
    ]
    with pytest.raises(UserError, match="'messages' contains a value that is nested too deeply"):
        usable(nested(200), "messages")
