"""Test rows with conversations: which turns are the prompt, which one is the answer, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import datasets
import pytest

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from tests.builders import bpe_byte_fallback, byte_bpe
from tests.data.chat import chatml
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
        ({"messages": [ASK, {**ANSWER, "function_call": {"name": "f"}}]}, "row 0 .*'function_call'"),
        ({"messages": [ASK, {**ANSWER, "audio": {"id": 3}}]}, "row 0 .*'audio'"),
        ({"messages": [say("user", None), ANSWER]}, r"row 0 .*content must be a string, got null"),
        (
            {"messages": [say("user", [{"type": "image", "url": "x"}]), ANSWER]},
            r"row 0 .*content has a part of type 'image', but only parts",
        ),
        ({"messages": [say("user", [{"type": "text"}]), ANSWER]}, r"row 0 .*a part of type text without a text"),
        ({"messages": [say("user", ["a"]), ANSWER]}, r"row 0 .*a part of type 'str'"),
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


def every(row: dict[str, Any], **options: Any) -> list[Example]:
    return load_examples([row], supervise="all", **options)


GREET, HELLO = say("user", "Hi"), say("assistant", "Ho")
SYSTEM = say("system", "Add.")


def test_every_assistant_turn_is_an_example() -> None:
    """With `supervise: all`, each answer is learned after exactly the turns before it."""
    rows = [{"messages": [SYSTEM, GREET, HELLO, ASK, ANSWER, GREET]}, {"messages": [ASK, ANSWER]}]
    found = load_examples(rows, supervise="all")
    assert [(contents(one), one.response) for one in found] == [
        (["Add.", "Hi"], "Ho"), (["Add.", "Hi", "Ho", "2 + 2?"], "Four."), (["2 + 2?"], "Four."),
    ]  # fmt: skip
    assert [one.index for one in found] == [0, 1, 2]  # random numbers and caches tell examples apart by them
    assert [one.place for one in found] == [f"row {r}, turn {t} (counting from 0)" for r, t in ((0, 2), (0, 4), (1, 1))]
    assert [one.response for one in load_examples(rows)] == ["Four.", "Four."]
    assert load_examples(rows)[0].place == "row 0 (counting from 0)"
    apart = {"messages": [GREET, HELLO, ASK, ANSWER], "system": "Add."}  # is not one of the turns that a user counts
    assert [one.source for one in every(apart)] == [(0, 1), (0, 3)]


def test_every_turn_is_read_in_its_own_context() -> None:
    """Each example trains on the turn that the message names, and only on it; a limit counts rows of the data."""
    tokenizer, rows = chatml(), [{"messages": [GREET, HELLO, ASK, ANSWER]}] * 2
    pairs = encode_pairs(load_examples(rows, supervise="all", limit=1), TextEncoder(tokenizer, "chat"))
    texts = [tokenizer.decode(row.student.ids) for row in pairs.rows]
    assert texts == [
        tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        for turns in ([GREET, HELLO], [GREET, HELLO, ASK, ANSWER])
    ]
    long = {"messages": [GREET, HELLO, say("user", "Why? " * 50), ANSWER]}
    examples = load_examples([rows[0], long], supervise="all")
    with pytest.raises(UserError, match=r"row 1, turn 3 \(counting from 0\): the prompt has"):
        encode_pairs(examples, TextEncoder(tokenizer, "chat"), max_prompt_length=99)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [GREET, {**HELLO, "weight": 0}, ASK, {**ANSWER, "weight": 1}]}, [("Hi Ho 2 + 2?", "Four.")]),
        ({"messages": [{**HELLO, "weight": 0}, ASK, ANSWER]}, [("Ho 2 + 2?", "Four.")]),
        ({"messages": [GREET, HELLO, ASK], "response": "Four."}, [("Hi", "Ho"), ("Hi Ho 2 + 2?", "Four.")]),
        ({"prompt": [GREET, HELLO, ASK], "completion": [ANSWER]}, [("Hi Ho 2 + 2?", "Four.")]),
        ({"prompt": [GREET], "completion": [HELLO, ASK, ANSWER]}, [("Hi", "Ho"), ("Hi Ho 2 + 2?", "Four.")]),
        ({"prompt": "Hi", "response": ["Ho", "Hello"]}, [("Hi", "Ho")]),
    ],
)
def test_which_turns_are_examples(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    """Turns of weight 0 and answers inside a prompt are context; they are not learned."""
    assert [(" ".join(contents(one)), one.response) for one in every(row)] == expected


def test_prompts_of_every_answer_can_be_answered() -> None:
    """`dwakd generate` answers before each assistant turn that is trained, and after a last turn without an answer."""
    row = {"messages": [GREET, {**HELLO, "weight": 0}, ASK, ANSWER, ASK]}
    first, second = (contents(one) for one in every(row, need_response=False))
    assert first == ["Hi", "Ho", "2 + 2?"]
    assert len(second) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [GREET, {**HELLO, "weight": 0}]}, "no assistant turn"),
        ({"messages": [HELLO, ASK, ANSWER]}, "turn before the answer .*none; give turn 0 the weight 0"),
        ({"messages": [ASK, ANSWER, HELLO]}, "role 'assistant'; give turn 2 the weight 0"),
        ({"messages": [ASK, ANSWER, HELLO], "system": "Add."}, "role 'assistant'; give turn 2 the weight 0"),
        ({"prompt": [GREET], "completion": [HELLO, ASK]}, "'completion' must be an assistant turn"),
    ],
)
def test_turns_that_answer_nothing_are_refused(row: dict[str, Any], message: str) -> None:
    """An assistant turn without a question before it would have no prompt."""
    with pytest.raises(UserError, match=f"row 0 .*{message}"):
        every(row)


def test_the_further_context_belongs_to_the_first_question() -> None:
    """The input column is read once, before the first answer, and stays in the context of the later ones."""
    found = every({"messages": [GREET, HELLO, ASK, ANSWER], "hint": "x"}, input="hint")
    assert [contents(one) for one in found] == [["Hi\nx"], ["Hi\nx", "Ho", "2 + 2?"]]


def test_parts_of_text_are_joined() -> None:
    """OpenAI's content parts are read as text, with their other keys ignored, in every role and in the answer."""
    parts = [
        {"type": "text", "text": "Four"},
        {"type": "text", "text": ".", "cache_control": {"type": "x"}, "image": None},
    ]
    assert read({"messages": [say("user", parts), say("assistant", parts)]}).references == ("Four.",)


def test_a_row_with_text_only_says_what_to_write() -> None:
    """TRL trains on a column `text`; the message says which columns dwakd needs."""
    with pytest.raises(
        UserError, match="only responses to prompts are trained: write 'prompt' and 'response', or 'messages'"
    ):
        load_examples([{"text": "Once upon a time"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Prompt ": "a", "response": "b"}, r"no column with the prompt .*; rename 'Prompt ' to 'prompt', or set data"),
        ({"prompt": "a", "Output": "b"}, r"no column with the response .*; rename 'Output' to 'output'"),
        ({"prompt;response": "a;b"}, "separate the columns of the file by commas, not by ';'"),
        ({"prompt": "a"}, r"set data\.response .*, or let the teacher answer with data\.responses: teacher"),
        (
            {"question": "a", "answer": "b"},
            r"set data\.prompt \(--prompt of eval and shrink, prompt_column in Python\)",
        ),
    ],
)
def test_columns_that_are_missing(row, message) -> None:
    """The message says what is wrong with the file, or which option names another column."""
    with pytest.raises(UserError, match=message):
        load_examples([row])


PRIVATE = {"prompt": "2 + 2?", "response": "Four.", "hint": "It is four. Now answer: 2 + 2?", "system": "Add."}


def test_only_teachers_read_their_prompt() -> None:
    """The private prompt reaches every teacher and never the student; all learn the same response."""
    rows = [PRIVATE, {**PRIVATE, "hint": None}, {**PRIVATE, "hint": [say("system", "Cheat."), say("user", "4?")]}]
    examples = load_examples(rows, teacher_prompt="hint")
    sides = TextEncoder(chatml(), "chat"), TextEncoder(bpe_byte_fallback(), "plain"), TextEncoder(chatml(), "chat")
    pairs = encode_pairs(examples, *sides)

    def prompts(row: int) -> list[str]:
        found = pairs.rows[row]
        every = zip(sides, (found.student, *found.teachers), strict=True)
        return [side.tokenizer.decode(encoded.ids[: encoded.num_prompt]) for side, encoded in every]

    assert all("Add." in text for text in prompts(1))
    own, *others = prompts(0)
    assert "four" not in own
    assert "Add." in own
    assert all("It is four." in text and "Add." not in text for text in others)
    assert "Cheat." in prompts(2)[2]
    assert {row.text for row in pairs.rows} == {"Four."}


def test_the_length_of_the_teachers_prompt_is_not_limited() -> None:
    """A long private prompt is not refused, is not cut, and leaves the response the room of a longest usual prompt."""
    hint = "Look at this. " * 60
    row = {"prompt": "Say it.", "response": "It is four. " * 30, "hint": hint}
    encoder = TextEncoder(byte_bpe(), "plain")
    pairs = encode_pairs(
        load_examples([row], teacher_prompt="hint"), encoder, encoder, max_length=64, max_prompt_length=32
    )
    side = pairs.rows[0].teachers[0]
    assert side.ids[: side.num_prompt].tolist() == encoder.prompt_ids(Example(0, hint))
    assert side.num_prompt > 64
    assert len(side.ids) - side.num_prompt == 32
    with pytest.raises(UserError, match=r"above data\.max_prompt_length=32"):
        encode_pairs([Example(0, hint, response="a")], encoder, encoder, max_length=64, max_prompt_length=32)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (PRIVATE, {"teacher_prompt": "context"}, "no column 'context'.*data.teacher_prompt"),
        (PRIVATE, {"teacher_prompt": "hint", "supervise": "all"}, "data.supervise: last"),
        ({**PRIVATE, "hint": 3}, {"teacher_prompt": "hint"}, "row 0 .*'hint' must be a string"),
        ({**PRIVATE, "hint": [ANSWER]}, {"teacher_prompt": "hint"}, "row 0 .*turn before the answer in 'hint'"),
        (PRIVATE, {"supervise": "each"}, "data.supervise 'each' is unknown: use last or all"),
    ],
)
def test_prompts_of_teachers_are_checked(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    """A wrong column, value or combination is refused before training."""
    with pytest.raises(UserError, match=message):
        load_examples([row], **options)
