"""Test that rows are encoded for all models and collated into batches."""

import logging
from functools import cache
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st

from dwakd.batch import PairedBatch
from dwakd.data.collator import collate, separate
from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import align_by_spelling, encode_pairs
from dwakd.data.rows import Example
from dwakd.errors import UserError
from tests.builders import bpe_byte_fallback, byte_bpe, wordpiece
from tests.data.chat import chatml, gemma_like
from tests.data.test_encoding import TEXTS


@cache
def sides(template: str = "plain") -> tuple[TextEncoder, TextEncoder]:
    return TextEncoder(byte_bpe(), template), TextEncoder(bpe_byte_fallback(), template)


def row(index: int, response: str, instruction: str = "Hi") -> Example:
    return Example(index, instruction, response=response, references=(response,))


def features(item: dict[str, Any], side: str) -> dict[str, list[Any]]:
    """Return the features of the student or of the first teacher."""
    return item["student"] if side == "student" else item["teachers"][0]


def supervised(item: dict[str, Any], side: str, field: str = "target_ids") -> list[int]:
    found = features(item, side)
    return [value for value, counts in zip(found[field], found["response_mask"], strict=True) if counts]


def test_layout_of_a_row() -> None:
    """Position i predicts target i. The last token of the prompt predicts the first token of the response."""
    student, teacher = sides()
    item = encode_pairs([row(7, "a 😀")], student, teacher)[0]
    assert item["example_id"] == 7
    for name, side in (("student", student), ("teacher", teacher)):
        prompt, (ids, ends) = side.prompt_ids(row(7, "")), side.response_ids("a 😀")
        whole = [*prompt, *ids, side.end_token_id]
        assert features(item, name)["input_ids"] == whole[:-1]
        assert features(item, name)["target_ids"] == whole[1:]
        assert features(item, name)["response_mask"] == [False] * (len(prompt) - 1) + [True] * (len(ids) + 1)
        assert features(item, name)["byte_ends"] == [0] * (len(prompt) - 1) + ends + [6]


def test_a_batch_gives_its_items_back() -> None:
    """Rows that keep their given response are collated again with rows that the student answered."""
    pairs = encode_pairs([row(3, "a 😀"), row(5, "Some longer answer."), row(6, "x")], *sides(), sides()[1])
    items = [pairs[index] for index in range(3)]
    assert separate(collate(items)) == items


def test_chat_supervises_the_assistant_s_text_alone() -> None:
    """Student and teacher have their own chat markers and end token but the same response text."""
    student, teacher = TextEncoder(chatml(), "chat"), TextEncoder(gemma_like(), "chat")
    history = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
    example = Example(0, "Name three colours.", response="Red, green and blue.", history=history)
    item = encode_pairs([example], student, teacher)[0]
    for name, side, end in (("student", student, "<|im_end|>"), ("teacher", teacher, "<end_of_turn>")):
        *ids, last = supervised(item, name)
        assert side.tokenizer.decode(ids) == "Red, green and blue."
        assert side.tokenizer.convert_ids_to_tokens(last) == end
        assert "Hello" in side.tokenizer.decode(features(item, name)["input_ids"])


@settings(max_examples=150, deadline=None)
@given(text=TEXTS.filter(lambda text: "▁" not in text and "<0x" not in text), room=st.integers(2, 24))
def test_truncation_covers_the_same_characters(text: str, room: int) -> None:
    """A truncated response has the same characters for student and teacher."""
    student, teacher = sides()
    num_prompt = max(len(side.prompt_ids(row(0, ""))) for side in (student, teacher))
    limits = {"max_length": num_prompt + room, "max_prompt_length": num_prompt}
    rows = [row(0, text), row(1, "x")]  # the second row always fits, so that the data set is not empty
    pairs = encode_pairs(rows, student, teacher, **limits, invalid_rows="skip")
    for kept in pairs.rows:
        whole = text if kept.example_id == 0 else "x"
        assert whole.startswith(kept.text)
        for encoder, side in ((student, kept.student), (teacher, kept.teachers[0])):
            assert len(side.ids) <= limits["max_length"]
            ids, ends = encoder.response_ids(kept.text)
            num_end = len(side.byte_ends) - len(ids)
            assert side.byte_ends[: len(ids)].tolist() == ends
            assert side.ids[side.num_prompt : side.num_prompt + len(ids)].tolist() == ids
            assert side.byte_ends[-1] == len(kept.text.encode())
            assert num_end == (1 if side.ids[-1] == encoder.end_token_id else 0)
            assert num_end == 0 or kept.text == whole


def test_truncation_keeps_what_fits() -> None:
    """The side with the least room determines where a response is cut. A truncated response has no end token."""
    student, teacher = sides()
    example = row(0, "a🤗b" * 30)
    pairs = encode_pairs([example], student, teacher, max_length=40, max_prompt_length=20)
    kept = pairs.rows[0]
    assert pairs.num_truncated == 1
    full = [len(kept.student.ids), len(kept.teachers[0].ids)]
    assert 37 <= max(full) <= 40  # an emoji is four tokens, which fit as a whole or not at all
    for name, side in (("student", student), ("teacher", teacher)):
        assert side.end_token_id not in supervised(pairs[0], name)
    assert supervised(pairs[0], "student", "byte_ends")[-1] == supervised(pairs[0], "teacher", "byte_ends")[-1]


def test_a_text_that_fits_without_its_end_token_is_kept_whole() -> None:
    """If only the end token does not fit, the text is kept and the end token is left out."""
    student, _ = sides()
    example = row(0, "The quick brown fox")
    ids = student.response_ids(example.response)[0]
    limit = len(student.prompt_ids(example)) + len(ids)
    exact = encode_pairs([example], student, max_length=limit + 1, max_prompt_length=limit)
    assert supervised(exact[0], "student") == [*ids, student.end_token_id]
    tight = encode_pairs([example], student, max_length=limit, max_prompt_length=limit - 1)
    assert supervised(tight[0], "student") == ids
    assert tight.rows[0].text == example.response


def test_rows_that_leave_nothing_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A row without a response token on one side is skipped and reported."""
    student, teacher = TextEncoder(byte_bpe(), "plain"), TextEncoder(wordpiece(), "plain")
    rows = [row(3, "The dog"), row(5, "\u200b\x00"), row(8, "fox")]
    with caplog.at_level(logging.WARNING, "dwakd"):
        pairs = encode_pairs(rows, student, teacher)
    assert pairs.report == {"no response token left": [5]}
    assert [pairs[k]["example_id"] for k in range(len(pairs))] == [3, 8]
    assert "1 of 3 rows (no response token left: 1)" in caplog.text
    assert len(encode_pairs(rows, student)) == 3


def test_an_emoji_that_does_not_fit_is_not_cut_in_two() -> None:
    """A response is not cut inside a character, because the other side could not encode half of it."""
    student, _ = sides()
    limit = len(student.prompt_ids(row(0, ""))) + 2  # the emoji is three tokens
    with pytest.raises(UserError, match=r"none of its 1 rows can be used \(no response token left: 1\)"):
        encode_pairs([row(0, "🤗🤗")], student, max_length=limit, max_prompt_length=limit - 1)


def test_invalid_rows_stop_the_run_or_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """An invalid row raises an error that names row, length, limit and model; with `skip`, it is skipped."""
    student, teacher = sides()
    rows = [row(0, "a"), row(4, "b", "long " * 40), row(5, "c", "long " * 40), row(6, " \n"), row(7, "d", "🤗" * 9)]
    with pytest.raises(UserError) as caught:
        encode_pairs(rows, student, teacher, max_prompt_length=40, source="data.jsonl")
    num_tokens = len(student.prompt_ids(rows[1]))
    assert str(caught.value) == (
        f"data.jsonl, row 4 (counting from 0): the prompt has {num_tokens} tokens for the student, above "
        "data.max_prompt_length=40 (2 of 5 rows have this error); "
        "raise data.max_prompt_length or set data.invalid_rows: skip"
    )
    with pytest.raises(UserError, match=r"train data, row 6 \(counting from 0\): the response is empty \(1 of 2"):
        encode_pairs([rows[0], rows[3]], student, teacher)
    with caplog.at_level(logging.WARNING, "dwakd"):
        pairs = encode_pairs(rows, student, teacher, max_prompt_length=40, invalid_rows="skip")
    assert pairs.report == {"prompt too long": [4, 5], "response empty": [6]}
    assert [pairs[k]["example_id"] for k in range(len(pairs))] == [0, 7]
    assert "3 of 5 rows (prompt too long: 2, response empty: 1)" in caplog.text


def test_a_prompt_too_long_for_the_teacher_alone() -> None:
    """The limit applies to each model, and the message names the model whose prompt is too long."""
    student, _ = sides()
    example = row(0, "a", "dog " * 3)
    short = max(len(student.prompt_ids(example)), 1)
    long = TextEncoder(byte_bpe(["zz"], vocab_size=260), "plain")
    assert len(long.prompt_ids(example)) > short
    with pytest.raises(UserError, match="tokens for the teacher"):
        encode_pairs([example], student, long, max_prompt_length=short)


def test_a_prompt_without_a_token_is_invalid() -> None:
    """A prompt without tokens is invalid, because no position predicts the first token of the response."""
    side = TextEncoder(byte_bpe(), "{instruction}")
    with pytest.raises(UserError, match="the prompt has no tokens for the student"):
        encode_pairs([row(0, "a", "")], side)


def test_invalid_options_are_refused() -> None:
    """Limits without room for a response, an unknown choice and an empty data set are refused."""
    student, teacher = sides()
    with pytest.raises(
        UserError, match=r"data\.max_prompt_length=512 must be at least 1 and below data.max_length=512"
    ):
        encode_pairs([row(0, "a")], student, teacher, max_prompt_length=512)
    with pytest.raises(UserError, match=r"data\.invalid_rows 'drop' is unknown: use error or skip"):
        encode_pairs([row(0, "a")], student, teacher, invalid_rows="drop")
    with pytest.raises(UserError, match="none of its 0 rows"):
        encode_pairs([], student, teacher)


def batch_of(pairs: EncodedPairs) -> PairedBatch:
    return collate([pairs[k] for k in range(len(pairs))])


def test_collate_pads_on_the_right() -> None:
    """Padding is masked for both models, and all other values stay in place."""
    student, teacher = sides()
    pairs = encode_pairs([row(0, "a"), row(9, "The quick brown fox jumps over 😀")], student, teacher)
    batch = batch_of(pairs)
    assert batch.example_ids == (0, 9)
    for side, tokens in zip(("student", "teacher"), batch, strict=True):
        shape = tokens.input_ids.shape
        for field in ("input_ids", "target_ids", "response_mask", "byte_ends"):
            tensor = getattr(tokens, field)
            assert tensor.shape == shape
            assert tensor.dtype == (torch.bool if field == "response_mask" else torch.long)
            for k in range(2):
                values = features(pairs[k], side)[field]
                assert tensor[k].tolist() == values + [0] * (shape[1] - len(values))
        lengths = tuple(len(features(pairs[k], side)["input_ids"]) for k in range(2))
        mask = tokens.attention_mask
        assert mask.dtype == torch.long
        assert mask.tolist() == [[1] * n + [0] * (shape[1] - n) for n in lengths]
        assert tokens.num_tokens == lengths
        assert tokens.num_rows == tuple(tokens.response_mask.sum(1).tolist())
    assert pairs.student_lengths == [len(pairs[k]["student"]["input_ids"]) for k in range(2)]


def test_without_a_teacher_there_is_the_student_only() -> None:
    """SFT needs no teacher tokenizer."""
    student, _ = sides()
    batch = collate([encode_pairs([row(0, "a")], student)[0]])
    assert batch.teachers == ()
    assert len(batch) == 1


def test_each_of_several_teachers_gets_its_own_tokens_and_places() -> None:
    """Each teacher reads its own tokens, and cache places belong to its own cache."""
    student, teacher = sides()
    pairs = encode_pairs([row(0, "a"), row(9, "The quick brown fox")], student, teacher, student)
    found = [lambda _, row: len(row["input_ids"]), None]
    first, second = collate([pairs[k] for k in range(2)], found).teachers
    assert first.cache_places == first.num_tokens
    assert second.cache_places is None
    assert torch.equal(second.input_ids, batch_of(pairs).student.input_ids)


def test_the_first_rows_of_a_batch_are_a_batch() -> None:
    """The first examples of a batch form a valid batch, and their alignment does not change."""
    student, teacher = sides()
    pairs = encode_pairs([row(k, "The quick brown fox"[: 5 * k + 4]) for k in range(3)], student, teacher)
    align_by_spelling(pairs, student, teacher)
    batch, alone = batch_of(pairs), collate([pairs[0]])
    cut = batch.examples([0])
    assert cut.example_ids == (0,)
    for tokens, expected in zip(cut, alone, strict=True):
        assert tokens.num_tokens == expected.num_tokens
        assert tokens.num_rows == expected.num_rows
        length = expected.input_ids.shape[1]
        assert torch.equal(tokens.input_ids[:, :length], expected.input_ids)
    assert torch.equal(cut.teachers[0].aligned_rows, alone.teachers[0].aligned_rows)
    assert len(batch) == 3, "a batch is never changed"


def test_a_batch_moves_as_a_whole() -> None:
    """`to` moves the whole batch, and a batch does not contain "input_ids", for which transformers tests."""
    student, teacher = sides()
    batch = batch_of(encode_pairs([row(0, "a")], student, teacher))
    moved = send_to_device(batch, torch.device("meta"))
    assert {tokens.byte_ends.device.type for tokens in moved} == {"meta"}
    assert moved.student.num_rows == batch.student.num_rows
    assert "input_ids" not in batch
