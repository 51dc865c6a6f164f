"""Test that retrained tokenizers keep their kind and that embeddings come from the right old tokens."""

import re

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dwakd.errors import UserError
from dwakd.tools.shrink.vocabulary import averaged_rows, old_tokens_of, train_tokenizer
from tests.builders import (
    CHAT_TEMPLATE,
    SAMPLE_TEXTS,
    bpe_byte_fallback,
    byte_bpe,
    unigram_byte_fallback,
    wordpiece,
)

TEXTS = [
    "The baker sold twelve loaves of bread and 23 cakes before noon.",
    "Bread is baked; cakes are baked as well, said the baker.\n\nThe end.",
    "  Loaves of bread: 12, 23, 4567.\n\tThe baker's bread.",
] * 20
LOSSLESS = {
    "byte_bpe": byte_bpe,
    "unigram": unigram_byte_fallback,
    "unigram_bare": lambda: unigram_byte_fallback(prefix_space=False),
    "bpe_fallback": bpe_byte_fallback,
}
KINDS = {**LOSSLESS, "wordpiece": wordpiece}
SIZES = {"byte_bpe": 320, "unigram": 325, "unigram_bare": 325, "bpe_fallback": 350, "wordpiece": 100}


def retrained(kind, texts=TEXTS, size=None):
    old = KINDS[kind]()
    return old, train_tokenizer(old, texts, size or SIZES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_size_special_tokens_template_and_file(kind, tmp_path):
    """The new tokenizer has the requested size and keeps special tokens and template, also after saving."""
    old, new = retrained(kind)
    assert SIZES[kind] - 3 <= len(new) <= SIZES[kind]
    assert sorted(new.get_vocab().values()) == list(range(len(new)))
    assert new.special_tokens_map == old.special_tokens_map
    assert new.chat_template == CHAT_TEMPLATE
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], *SAMPLE_TEXTS, new.eos_token]:
        assert again(text).input_ids == new(text).input_ids
    assert new(new.eos_token, add_special_tokens=False).input_ids[-1] == new.eos_token_id


@pytest.mark.parametrize("kind", LOSSLESS)
def test_any_text_survives(kind):
    """Any text can be encoded and decoded without loss, because unknown characters fall back to bytes."""
    _, new = retrained(kind)
    for text in [*SAMPLE_TEXTS, "", " ", "\n\n  x\t", "unseen ζ \u200d 🙃 e\u0301", "literal <0x0A>"]:
        assert new.decode(new(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_learns_the_texts_and_keeps_words_apart(kind):
    """Tokens are learnt from the texts and do not cross word boundaries."""
    old, new = retrained(kind)
    text = TEXTS[0]
    assert len(new(text).input_ids) < len(old(text).input_ids)
    for token in set(new.get_vocab()) - set(new.all_special_tokens):
        assert "▁" not in token.strip("▁")
        assert "Ġ" not in token.strip("Ġ")


def test_digits_stay_single_where_the_old_vocabulary_has_them_single():
    """If the old vocabulary has every digit as a separate token only, so has the new one."""
    single = train_tokenizer(byte_bpe(["no figures here"]), TEXTS, 400)
    assert single.convert_ids_to_tokens(single("x 4567").input_ids)[-4:] == list("4567")
    joined = train_tokenizer(byte_bpe(["12 12 12 12"]), TEXTS, 400)
    assert joined.convert_ids_to_tokens(joined("x 4567").input_ids)[-4:] != list("4567")


def test_unused_added_tokens_are_removed_and_used_ones_kept():
    """Reserved added tokens, of which Gemma has 6,000, are removed; used ones are kept."""
    old = byte_bpe()
    old.add_special_tokens({"additional_special_tokens": ["<used>", "<reserved>", "<template>"]})
    old.chat_template = "<template>" + CHAT_TEMPLATE
    new = train_tokenizer(old, [*TEXTS, "a <used> token"], 320)
    assert "<reserved>" not in new.get_vocab()
    ids = new("<template><used>").input_ids
    assert new.convert_ids_to_tokens(ids) == ["<template>", "<used>"]
    assert new.decode(ids, skip_special_tokens=True) == ""


def test_post_processor_ids_are_renewed_also_in_a_sequence():
    """The post-processor, which is a sequence in Llama 3, uses the new ids."""
    old = byte_bpe(vocab_size=400, eos="</s>")
    old.add_special_tokens({"bos_token": "<s>"})
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", old.bos_token_id)])
    sequence = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    for processor in (template, sequence):
        old.backend_tokenizer.post_processor = processor
        new = train_tokenizer(old, TEXTS, 300)
        assert new("bread").input_ids[0] == new.bos_token_id < 300


@pytest.mark.parametrize("kind", KINDS)
def test_too_small_a_vocabulary_names_the_minimum_that_works(kind):
    """If the vocabulary size is too small, the message contains the smallest size that works."""
    with pytest.raises(UserError, match="--vocab-size") as caught:
        retrained(kind, size=20)
    minimum = max(map(int, re.findall(r"\d+", str(caught.value))))
    with pytest.raises(UserError):
        retrained(kind, size=minimum - 1)
    assert len(retrained(kind, size=minimum + 1)[1]) <= minimum + 1


def test_texts_too_few_for_the_size_give_a_smaller_vocabulary():
    """If the texts do not contain enough tokens, the vocabulary is smaller than requested."""
    new = train_tokenizer(byte_bpe(), ["abc"], 5000)
    assert len(new) == max(new.get_vocab().values()) + 1 < 300


def test_other_kinds_are_refused():
    """A word-level tokenizer is refused."""
    plain = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match="WordLevel"):
        train_tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>"), TEXTS, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_come_from_the_same_string(kind):
    """Each new token starts from the old token with the same string or from the old tokens of its pieces."""
    old, new = retrained(kind)
    sources = old_tokens_of(old, new)
    old_vocab = old.get_vocab()
    marker = "##" if kind == "wordpiece" else ""
    for token, index in new.get_vocab().items():
        if token in old_vocab:
            assert sources[index] == [old_vocab[token]]
        else:
            pieces = old.convert_ids_to_tokens(sources[index])
            if kind == "byte_bpe":
                assert "".join(pieces) == token
            elif not pieces:
                assert kind == "wordpiece"
                assert any(f"##{character}" not in old_vocab for character in token.removeprefix("##"))
            elif old.unk_token not in pieces and not any(piece.startswith("<0x") for piece in pieces):
                assert "".join(piece.removeprefix("##") for piece in pieces) == token.removeprefix(marker)
    assert any(len(source) > 1 for source in sources)


def test_piece_inside_a_word_starts_from_pieces_inside_a_word():
    """WordPiece has separate embeddings for a piece at the start and inside a word. Each starts from its own kind."""
    old, new = wordpiece(["sing ring in g sin gs ings"] * 3, 24), wordpiece(["singings ringing"] * 9, 60)
    vocab, old_vocab = new.get_vocab(), old.get_vocab()
    inside = [token for token in vocab if token.startswith("##") and token not in old_vocab]
    assert "##inging" in inside
    for token in inside:
        pieces = old.convert_ids_to_tokens(old_tokens_of(old, new)[vocab[token]])
        assert all(piece.startswith("##") for piece in pieces)
        assert "".join(piece.removeprefix("##") for piece in pieces) == token.removeprefix("##")


def test_averaged_rows():
    """A token with several sources gets their mean, with one its copy, and with none the mean of all embeddings."""
    table = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 10.0]], requires_grad=True)
    rows = averaged_rows(table, [[2], [0, 1], [], [1, 1, 0, 0]])
    assert rows.tolist() == [[5.0, 10.0], [2.0, 1.0], [3.0, 4.0], [2.0, 1.0]]
    assert not rows.requires_grad
    assert averaged_rows(table.bfloat16(), [[0, 1], []]).dtype == torch.bfloat16
