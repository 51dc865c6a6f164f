"""Test that the demo's tokenizers are lossless, belong to different families and give short rows."""

import pytest

from tests.tools.demo.builders import Splits


@pytest.mark.parametrize("side", [0, 1])
def test_tokenizers_are_lossless(tokenizers, texts: list[str], side: int) -> None:
    """Decoding gives the encoded text, spaces and accents included."""
    tokenizer = tokenizers[side]
    unseen = [" two  spaces ", "naïve Łódź 東京 🙂\n", "e\u0301", "<0x41> and \t tab", "don't, 'quoted'"]
    for text in [*texts[:1500], *unseen]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_tokenizers_are_of_different_families(tokenizers, texts: list[str]) -> None:
    """The tokenizers split text differently, so that the demo shows distillation across tokenizers."""
    student, teacher = tokenizers
    assert student.bos_token_id is None
    assert teacher("Oslo").input_ids[0] == teacher.bos_token_id
    for tokenizer in tokenizers:
        assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert len(student) == 640
    assert 1000 <= len(teacher) <= 1536
    lengths = [sum(len(tokenizer.tokenize(text)) for text in texts) for tokenizer in tokenizers]
    assert lengths[0] > 1.2 * lengths[1]


def test_rows_are_short_in_tokens(tokenizers, splits: Splits) -> None:
    """Rows are short, so that the demo takes about five minutes."""
    for tokenizer in tokenizers:
        for row in splits[0]:
            assert len(tokenizer(f"{row.instruction}\n{row.response}").input_ids) <= 72
