"""Which answers are left out, and that a file of answers is read as the prompts and answers it was made from."""

import json

import pytest

from dwakd import UserError, load_examples
from dwakd.answers import GenerateSection, repetition
from dwakd.answers.answers import Answer, collect, fault_of
from tests.answers.builders import write_rows

GOOD = Answer("A red door is warm.", 7, "end", -0.5)


@pytest.mark.parametrize(
    ("answer", "options", "fault"),
    [
        (GOOD, {}, None),
        (GOOD._replace(finish="cut"), {}, "cut"),
        (GOOD._replace(finish="refused"), {}, "refused"),
        (GOOD._replace(text=""), {"min_characters": 5}, "empty"),
        (GOOD, {"min_characters": 19}, None),
        (GOOD, {"min_characters": 20}, "min_characters"),
        (GOOD, {"max_characters": 19}, None),
        (GOOD, {"max_characters": 18}, "max_characters"),
        (GOOD._replace(text="so it is " * 9), {"max_repetition": 0.5}, "max_repetition"),
        (GOOD, {"max_repetition": 0.0}, None),
        (GOOD, {"min_log_prob": -0.5}, None),
        (GOOD, {"min_log_prob": -0.4}, "min_log_prob"),
    ],
)
def test_faults(answer, options, fault):
    """A filter that is off by one or reversed keeps what the user wanted to leave out."""
    assert fault_of(answer, GenerateSection(**options)) == fault


def test_repetition_counts_words_of_every_script():
    """Chinese has no spaces; an answer that loops must be found there, too."""
    assert repetition("one two three four") == 0
    assert repetition("one two three four one two three four") == pytest.approx(1 / 5)
    assert repetition("今天天气很好，" * 6) > 0.7
    assert repetition("今天天气很好，我们去公园散步吧。") == 0
    assert repetition("") == 0


ROWS = {
    "prompts": [{"prompt": "Why?\u2028Say it."}, {"prompt": "What?"}],
    "inputs": [{"instruction": "Add.", "input": "1 and 2"}, {"instruction": "Why?", "input": ""}],
    "conversations": [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]},
        {
            "messages": [
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "documents": [{"title": "t", "text": "x"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_a_file_of_answers_is_read_as_its_prompts_and_answers(kind, tmp_path):
    """Training on the file must show the student the same prompt that the teacher answered, tools and turns included."""
    asked = load_examples(ROWS[kind], need_response=False)
    answers = [[Answer(f"Answer {n}.", 3, "end", -1.0)] for n in range(len(asked))]
    rows, examples, left_out = collect(asked, answers, GenerateSection(), "teacher")
    read = load_examples(write_rows(tmp_path / "answers.jsonl", json.loads(json.dumps(rows))))
    assert read == examples
    assert [example.response for example in read] == ["Answer 0.", "Answer 1."]
    assert [example.turns for example in read] == [example.turns for example in asked]
    assert left_out == {}
    assert len({"chat_template_kwargs" in row for row in rows}) == 1, "`datasets` would insert null, which TRL refuses"
    kinds = {type(value) for row in rows for value in (row["prompt"], row["completion"])}
    assert kinds == ({list} if kind == "conversations" else {str}), "TRL reads texts or messages, but not both"


def test_every_reason_is_counted():
    """The user has to see which filter costs how many rows."""
    asked = load_examples([{"prompt": "Why?"}], need_response=False)
    answers = [GOOD, GOOD._replace(text=""), GOOD._replace(finish="cut"), GOOD._replace(text="x" * 99)]
    collected = collect(asked, [answers], GenerateSection(max_characters=50), "teacher")
    assert collected.left_out == {"cut": 1, "empty": 1, "max_characters": 1}
    assert [(row["prompt_number"], row["sample"]) for row in collected.rows] == [(0, 0)]
    with pytest.raises(UserError, match=r"no answer of T is left \(1 empty, 1 by generate\.max_characters\)"):
        collect(asked, [[answers[1], answers[3]]], GenerateSection(max_characters=50), "T")
