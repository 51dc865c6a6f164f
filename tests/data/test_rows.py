"""Conversations as rows: which turns are read, which one is learnt, and what is refused."""

from typing import Any

import datasets
import pytest

from dwakd.data.rows import Example
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from tests.data.test_chat import ANSWER, ASK, CALL, say


def read(row: dict[str, Any]) -> Example:
    return load_examples([row])[0]


def contents(example: Example) -> list[str]:
    return [turn["content"] for turn in example.turns]


def test_earlier_turns_of_a_completion_are_read() -> None:
    """Only its last turn is learnt; without the others it would answer nothing."""
    completion = [say("assistant", "K."), say("user", "Another."), say("assistant", "Q.")]
    for prompt in ([say("user", "Pick a letter.")], "Pick a letter."):
        example = read({"prompt": prompt, "completion": completion})
        assert contents(example) == ["Pick a letter.", "K.", "Another."]
        assert example.response == "Q."
    with_input = load_examples([{"prompt": "Pick.", "hint": "A-Z", "completion": completion}], input="hint")[0]
    assert contents(with_input) == ["Pick.\nA-Z", "K.", "Another."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [ASK], "completion": [ANSWER, ASK]}, r"row 0 .*'completion' ends with a turn of role 'user'"),
        ({"prompt": [ASK], "completion": [say("tool", "4")]}, r"row 0 .*'completion' ends with a turn of role 'tool'"),
        ({"prompt": [ASK], "completion": [ANSWER, ANSWER]}, r"row 0 .*turn before the answer.*'assistant'"),
        ({"prompt": [ASK, ANSWER], "completion": [ANSWER]}, r"row 0 .*turn before the answer.*'assistant'"),
        ({"prompt": [ASK, ANSWER], "completion": "Four."}, r"row 0 .*turn before the answer.*'assistant'"),
        ({"messages": [ASK, ANSWER, ANSWER]}, r"row 0 .*turn before the answer.*'assistant'"),
        ({"messages": [say("system", "s"), ANSWER]}, r"row 0 .*turn before the answer.*'system'"),
        ({"messages": [ANSWER]}, r"row 0 .*turn before the answer.*none"),
        ({"messages": [say("system", "s")]}, "row 0 .*no assistant turn"),
        ({"messages": []}, "row 0 .*no assistant turn"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, r"row 0 .*weight 0"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, r"row 0 .*weight 0.5"),
        ({"messages": [ASK, {**ANSWER, "train": False}]}, r"row 0 .*train False"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]}, "weight 0"),
        ({"prompt": "q", "completion": [{**ANSWER, "tool_calls": [CALL]}]}, "row 0 .*'tool_calls'"),
        ({"messages": [ASK, {**ANSWER, "reasoning_content": "2 and 2"}]}, "row 0 .*'reasoning_content'"),
        ({"messages": [ASK, say("assistant", None, tool_calls=[CALL])]}, "row 0 .*'tool_calls'"),
        ({"messages": [ASK, {**ANSWER, "audio": {"id": 3}}]}, "row 0 .*'audio'"),
        ({"messages": [say("user", None), ANSWER]}, r"row 0 .*content is null"),
        ({"messages": [say("user", [{"type": "image", "url": "x"}]), ANSWER]}, r"row 0 .*content is list"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "row 0 .*'tools' .*JSON"),
        ({"messages": [ASK, ANSWER], "tools": ["x"]}, "row 0 .*'tools' must be a list of objects"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": [{}]}, "row 0 .*'chat_template_kwargs' must be an object"),
        ({"messages": [say("system", "s"), ASK, ANSWER], "system": "t"}, "row 0 .*'system' .*differ"),
    ],
)
def test_what_cannot_be_read_or_learnt_is_refused(row: dict[str, Any], message: str) -> None:
    """Half of a conversation, or an answer that the data marks as wrong, would be learnt without a word."""
    with pytest.raises(UserError, match=message):
        read(row)


def test_answers_of_weight_zero_may_be_asked_for_in_evaluation() -> None:
    """Weights say what to learn, and an evaluation learns nothing."""
    row = {"messages": [ASK, {**ANSWER, "weight": 0}]}
    assert load_examples([row], need_response=False)[0].references == ("Four.",)


def test_a_tool_may_speak_before_the_answer() -> None:
    """Agents' answers follow a tool's turn."""
    example = read({"messages": [ASK, say("assistant", None, tool_calls=[CALL]), say("tool", "4", name="sum"), ANSWER]})
    assert example.turns[1:] == [say("assistant", "", tool_calls=[CALL]), say("tool", "4", name="sum")]


def test_tables_mean_what_rows_mean() -> None:
    """`datasets` fills the keys that a turn or a tool lacks with nulls, which no template must print."""
    tools = [{"name": "a", "parameters": {"x": {"type": "int"}}}, {"name": "b", "parameters": {"y": {"type": "str"}}}]
    turns = [say("system", "s"), ASK, say("assistant", "", tool_calls=[CALL]), say("tool", "4", name="sum"), ANSWER]
    rows = [{"messages": turns, "tools": tools}, {"messages": [ASK, ANSWER], "tools": []}]
    assert load_examples(datasets.Dataset.from_list(rows)) == load_examples(rows)
    assert load_examples(rows)[1] == Example(1, "2 + 2?", response="Four.", references=("Four.",))


def test_columns_of_rows_that_are_no_conversation() -> None:
    """A column that happens to be called system, tools or documents belongs to other rows' meaning."""
    row = {"instruction": "i", "output": "o", "system": "Linux", "documents": ["d"], "tools": "hammer"}
    assert read(row) == Example(0, "i", response="o", references=("o",))
