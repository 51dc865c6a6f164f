"""Test that rows which are skipped or truncated when they are encoded are counted and reported."""

import logging
from typing import Any

import pytest

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from tests.builders import bpe_byte_fallback, byte_bpe

ROWS = [Example(n, f"Ask {n}", response=f"Answer {n}") for n in range(6)]


class Refusing(TextEncoder):
    """Encoder whose template refuses some rows. It counts its calls."""

    def __init__(self, refused: set[int]) -> None:
        super().__init__(byte_bpe(), "plain")
        self.refused, self.num_calls = refused, 0

    def prompt_ids_batch(self, examples: Any) -> list[list[int]]:
        self.num_calls += 1
        for example in examples:
            if example.index in self.refused:
                raise UserError(f"the template refuses row {example.index}")
        return super().prompt_ids_batch(examples)


def test_cut_responses_are_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """One warning states how many responses were truncated and therefore have no end token."""
    rows = [*ROWS[:2], *(Example(n, "Go on.", response="The quick brown fox. " * 40) for n in (2, 3, 4))]
    encoders = TextEncoder(byte_bpe(), "plain"), TextEncoder(bpe_byte_fallback(), "plain")
    with caplog.at_level(logging.WARNING, "dwakd"):
        pairs = encode_pairs(rows, *encoders, encoders[1], max_length=64, max_prompt_length=32, source="train.jsonl")
        assert pairs.of_teacher(1).num_truncated == 3
    assert len(caplog.records) == 1
    assert "train.jsonl: 3 of 5 responses" in caplog.text
    assert "data.max_length=64" in caplog.text
    caplog.clear()
    encode_pairs(ROWS, *encoders)
    encode_pairs(rows, *encoders, max_length=64, max_prompt_length=32, length_option=None)
    assert not caplog.records


def test_rows_that_a_template_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """With `skip`, a conversation that the template refuses does not stop the run."""
    teacher = Refusing({1, 4})
    with caplog.at_level(logging.WARNING, "dwakd"):
        pairs = encode_pairs(ROWS, TextEncoder(byte_bpe(), "plain"), teacher, invalid_rows="skip")
    assert pairs.report == {"refused by the template or the model": [1, 4]}
    assert [row.example_id for row in pairs.rows] == [0, 2, 3, 5]
    assert "2 of 6 rows (refused by the template or the model: 2); first error: train data, row 1 " in caplog.text
    assert pairs.rows[1].student.ids.tolist() == encode_pairs([ROWS[2]], Refusing(set())).rows[0].student.ids.tolist()
    with pytest.raises(UserError, match=r"row 1 .*the template refuses row 1.*2 of 6 rows.*invalid_rows: skip"):
        encode_pairs(ROWS, teacher)
    with pytest.raises(UserError, match=r"none of its 6 rows can be used .* the template refuses row 0"):
        encode_pairs(ROWS, Refusing(set(range(6))), invalid_rows="skip")


def test_rows_are_encoded_together() -> None:
    """Rows are tokenised in batches. One by one, a large data set would take several times as long."""
    student = Refusing(set())
    encode_pairs(ROWS, student)
    assert student.num_calls == 1


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_conversations_with_the_default_template_give_a_warning(
    template: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A user of an instruct model expects its chat template; one who has chosen a template gets no warning."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with caplog.at_level(logging.WARNING, "dwakd"):
        encode_pairs(load_examples([{"messages": turns}]), TextEncoder(byte_bpe(), template), source="chats.jsonl")
        encode_pairs(ROWS, TextEncoder(byte_bpe(), template), max_length=512)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (template == "alpaca")
    assert all(
        "chats.jsonl: 1 rows are conversations, which data.template: alpaca turns into one instruction" in text
        for text in warnings
    )
