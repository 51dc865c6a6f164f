"""Test rows with conversations: which turns are the prompt, which one is the answer, and what is refused."""

import json
from dataclasses import replace
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
    """The last turn of a completion is the answer, and its other turns belong to the prompt."""
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
        ({"prompt": [ASK], "completion": [ANSWER, ASK]}, r"row 0 .*'completion' .*role 'user'"),
        ({"prompt": [ASK], "completion": [say("tool", "4")]}, r"row 0 .*'completion' .*role 'tool'"),
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
        ({"messages": [say("user", None), ANSWER]}, r"row 0 .*content must be a string, got null"),
        (
            {"messages": [say("user", [{"type": "image", "url": "x"}]), ANSWER]},
            r"row 0 .*content must be a string, got list",
        ),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "row 0 .*'tools' .*JSON"),
        ({"messages": [ASK, ANSWER], "tools": ["x"]}, "row 0 .*'tools' must be a list of objects"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": [{}]}, "row 0 .*'chat_template_kwargs' must be an object"),
        ({"messages": [say("system", "s"), ASK, ANSWER], "system": "t"}, "row 0 .*'system' .*differ"),
        ({"prompt": "q", "response": "a", "system": 3}, "row 0 .*'system' must be a string, got int"),
        ({"prompt": "q", "response": "a", "chat_template_kwargs": "x"}, "row 0 .*'chat_template_kwargs' .*JSON"),
        ({"prompt": "q", "response": "a", "tools": '[{"name": "a", "name": "b"}]'}, "row 0 .*'tools' .*key 'name'"),
        ({"prompt": "q", "response": "a", "chat_template_kwargs": '{"a": 1, "a": 2}'}, "row 0 .*more than one key 'a'"),
        *(
            ({"messages": [ASK, ANSWER], "chat_template_kwargs": {key: True}}, f"row 0 .*chat_template_kwargs.*'{key}'")
            for key in ("chat_template", "tokenize", "add_generation_prompt", "tools", "messages", "return_dict")
        ),
    ],
)
def test_what_cannot_be_read_or_learnt_is_refused(row: dict[str, Any], message: str) -> None:
    """Incomplete conversations, and answers with another weight than 1, are refused."""
    with pytest.raises(UserError, match=message):
        read(row)


def test_answers_of_weight_zero_may_be_asked_for_in_evaluation() -> None:
    """An evaluation accepts answers of weight 0, because weights concern the training only."""
    row = {"messages": [ASK, {**ANSWER, "weight": 0}]}
    assert load_examples([row], need_response=False)[0].references == ("Four.",)


def test_a_tool_may_speak_before_the_answer() -> None:
    """The turn before the answer may be that of a tool."""
    example = read({"messages": [ASK, say("assistant", None, tool_calls=[CALL]), say("tool", "4", name="sum"), ANSWER]})
    assert example.turns[1:] == [say("assistant", "", tool_calls=[CALL]), say("tool", "4", name="sum")]


def test_data_sets_and_lists_give_the_same_examples() -> None:
    """A `datasets.Dataset`, which inserts null for missing keys, gives the same examples as a list of rows."""
    tools = [{"name": "a", "parameters": {"x": {"type": "int"}}}, {"name": "b", "parameters": {"y": {"type": "str"}}}]
    turns = [say("system", "s"), ASK, say("assistant", "", tool_calls=[CALL]), say("tool", "4", name="sum"), ANSWER]
    rows = [{"messages": turns, "tools": tools}, {"messages": [ASK, ANSWER], "tools": []}]
    assert load_examples(datasets.Dataset.from_list(rows)) == load_examples(rows)
    assert load_examples(rows)[1] == Example(1, "2 + 2?", response="Four.", references=("Four.",))


@pytest.mark.parametrize("row", [{"prompt": "i", "response": "o"}, {"instruction": "i", "output": "o"}])
def test_columns_beside_a_prompt_that_is_a_string(row: dict[str, Any]) -> None:
    """System text, tools and documents of a row belong to the prompt, also if the prompt is a string."""
    plain = Example(0, "i", response="o", references=("o",))
    assert read({**row, "documents": ["d"], "tools": "hammer", "system": None, "chat_template_kwargs": ""}) == plain
    assert read({**row, "documents": "[1]", "tools": "[]", "system": ""}) == plain
    assert read({**row, "system": "Be brief."}) == replace(plain, history=(say("system", "Be brief."),))
    options = {"terse": True, "documents": [{"text": "d"}], "tools": [{"name": "t"}]}
    columns = {"chat_template_kwargs": {"terse": True}, "documents": options["documents"], "tools": options["tools"]}
    assert read({**row, **columns}) == replace(plain, options=options)
    assert read({**row, **{key: json.dumps(value) for key, value in columns.items()}}) == replace(
        plain, options=options
    )


@pytest.mark.parametrize("column", ["response", "completion", "output"])
def test_a_column_answers_a_conversation_that_ends_without_an_answer(column: str) -> None:
    """If a conversation ends with a question, the answer is read from the response column."""
    turns = [say("user", "Hi"), say("assistant", "Ho"), ASK]
    example = read({"messages": turns, column: "Four."})
    assert (contents(example), example.response) == (["Hi", "Ho", "2 + 2?"], "Four.")
    assert read({"messages": turns, column: [ANSWER]}) == example
    assert read({"messages": [*turns[:2], say("tool", "4")], column: "Four."}).turns[-1] == say("tool", "4")
    rows = [{"messages": [*turns, ANSWER], column: "other"}, {"messages": turns, column: "Four."}]
    assert [row.references for row in load_examples(rows)] == [("Four.",)] * 2
    assert load_examples(rows, need_response=False)[1].references == ("Four.",)
    assert read({"messages": turns, column: None}).response == "Ho"
