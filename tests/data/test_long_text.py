"""Test that long responses are shortened before they are tokenised only where their first tokens stay the same."""

import json
import random
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from tests.builders import bpe_byte_fallback, byte_bpe, unigram_byte_fallback
from tests.data.test_encoding import ALL, SNIPPETS, metaspace_bpe, nfc_byte_bpe, nfkc_unigram, uncased_wordpiece
from tests.data.test_token_bytes import roberta_like

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUMBERS = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))"  # groups three digits from the right, so the end of a number matters
)
WORDS = [
    "the quick",
    " brown",
    " fox",
    " jumps",
    " don'",
    "t",
    " été",
    " naïve",
    " Straße",
    " Привет",
    " мир",
    " 1234567",
]
TEXTS = st.builds(
    lambda seed, share: "".join(
        random.Random(seed + n).choice(WORDS if random.Random(-seed - n).random() < share else SNIPPETS)
        for n in range(90)
    ),
    st.integers(0, 10**6),
    st.sampled_from([0.5, 0.9, 1.0]),
)


def split_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 3's, which also groups digits from the right."""
    tokenizer = byte_bpe()
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (NUMBERS, LLAMA3)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    return tokenizer


def word_unigram() -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer that separates words."""
    tokenizer = unigram_byte_fallback()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return tokenizer


def joined_unigram() -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer with pieces of two words, whose choice at the start of a text depends on its end."""
    pieces = {"▁fox": -5.0, "▁jumps": -5.0, "▁end": -5.0, "▁fox▁jumps": -1.0, "▁jumps▁fox": -1.0, "▁jumps▁end": -0.1}
    state = json.loads(unigram_byte_fallback().backend_tokenizer.to_str())
    state["model"]["vocab"] += map(list, pieces.items())
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")


def phrase_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token of several words, which a cut could divide."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens([AddedToken("the quick brown fox jumps the quick brown fox"), AddedToken("<x>", rstrip=True)])
    return tokenizer


CUT = [
    byte_bpe,
    nfc_byte_bpe,
    roberta_like,
    split_bpe,
    word_unigram,
    uncased_wordpiece,
    bpe_byte_fallback,
    nfkc_unigram,
]


@cache
def encoder(build: Callable[[], PreTrainedTokenizerFast]) -> TextEncoder:
    return TextEncoder(build(), "plain")


@pytest.mark.parametrize("build", [*CUT, phrase_bpe, *(build for build in ALL if build not in CUT)])
@settings(max_examples=20, deadline=None)
@given(text=TEXTS, limit=st.integers(1, 12))
def test_first_tokens_of_a_long_text_are_those_of_the_whole(
    build: Callable[[], PreTrainedTokenizerFast], text: str, limit: int
) -> None:
    """The first `limit` tokens and ends do not depend on the cut, and no text looks short enough to be kept whole."""
    ids, ends = encoder(build).response_ids(text)
    first_ids, first_ends = encoder(build).response_ids_batch([text], limit=limit)[0]
    assert (first_ids[:limit], first_ends[:limit]) == (ids[:limit], ends[:limit])
    assert (len(first_ids) > limit) == (len(ids) > limit)


@pytest.mark.parametrize("build", CUT)
def test_long_texts_are_cut(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Most of a long text is not tokenised, if the tokenizer separates words; otherwise such rows take seconds."""
    text = "The quick brown fox jumps over the lazy dog. " * 200
    assert len(encoder(build).response_ids_batch([text], limit=20)[0][0]) < 400


def test_texts_whose_start_depends_on_their_end_are_not_cut() -> None:
    """Two tokens of this text overlap wherever it is cut, so that its last word decides how the first ones are split."""
    side, text = encoder(joined_unigram), "fox jumps " * 100 + "end"
    assert side.response_ids_batch([text], limit=5)[0] == side.response_ids(text)


def test_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose response is cut for one side only is truncated as before."""
    rows = [
        Example(0, "Go", response="The quick brown fox jumps over it. " * 150),
        Example(1, "Go", response="你好" * 900),
    ]
    sides = encoder(byte_bpe), encoder(metaspace_bpe)
    found = encode_pairs(rows, *sides, max_length=40, max_prompt_length=9)
    monkeypatch.setattr("dwakd.data.encoding.leading_text", lambda text, *_, **__: text)
    whole = encode_pairs(rows, *sides, max_length=40, max_prompt_length=9)
    assert [found[n] for n in range(2)] == [whole[n] for n in range(2)]
    assert [row.text for row in found.rows] == [row.text for row in whole.rows]
