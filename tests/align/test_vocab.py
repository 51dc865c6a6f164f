"""Test the matching of vocabularies by spelling against plain definitions."""

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from safetensors.numpy import load_file, save_file

from dwakd.align.vocab import NONE, CandidateMatcher, exact_overlap, nearest_tokens, token_text
from dwakd.data.encoding import TextEncoder
from dwakd.folders import CACHE_VARIABLE
from tests.builders import bpe_byte_fallback, byte_bpe, unigram_byte_fallback


def random_tokens(count: int, seed: int) -> list[bytes]:
    """Return different tokens of many lengths and scripts, some with incomplete characters."""
    generator = random.Random(seed)
    letters = "aaeeiostn" + "éß你好мир😀 \n"
    tokens = [letter.encode() for letter in set(letters)]
    while len(tokens) < count:
        text = "".join(generator.choices(letters, k=generator.choice([1, 2, 3, 4, 5, 8, 12, 70]))).encode()
        tokens.append(text[generator.choice([0, 0, 0, 1]) :] or b"x")
    return list(dict.fromkeys(tokens))


def test_nearest_is_the_first_of_least_distance():
    """Each token is mapped to the first token of least edit distance."""
    source, target = random_tokens(400, 1), random_tokens(300, 2)
    found = nearest_tokens((None, *source), (*target, None), (0, len(target))).tolist()
    assert found[0] == len(target)
    for token, index in zip(source, found[1:], strict=True):
        distances = [Levenshtein.distance(token_text(token), token_text(other)) for other in target]
        assert index == int(np.argmin(distances))


def test_identical_vocabularies_map_by_id():
    """With one vocabulary, every token is mapped to itself, special tokens included."""
    tokens = TextEncoder(byte_bpe(), "plain").token_bytes()
    assert None in tokens
    assert torch.equal(nearest_tokens(tokens, tuple(tokens)), torch.arange(len(tokens)))
    assert all(torch.equal(side, torch.arange(len(tokens))) for side in exact_overlap(tokens, tuple(tokens)))


def test_space_marks_of_both_tokenizers_match():
    """Tokens with the space marks of SentencePiece and of byte-level BPE match, because bytes are compared."""
    student, teacher = (TextEncoder(build(), "plain") for build in (byte_bpe, bpe_byte_fallback))
    ends = student.end_token_id, teacher.end_token_id
    mine, theirs = exact_overlap(student.token_bytes(), teacher.token_bytes(), ends)
    pairs = dict(zip(mine.tolist(), theirs.tolist(), strict=True))
    names = [encoder.tokenizer.get_vocab() for encoder in (student, teacher)]
    assert pairs[names[0]["Ġthe"]] == names[1]["▁the"]
    assert pairs[names[0]["Ċ"]] == names[1]["\n"]
    assert pairs[ends[0]] == ends[1]
    assert mine.tolist() == sorted(set(mine.tolist()))
    assert len(set(theirs.tolist())) == len(theirs)


def test_byte_pieces_pair_with_byte_pieces():
    """If a vocabulary has a character also as a byte piece, byte pieces match byte pieces and characters match characters."""
    one, other = (TextEncoder(build(), "plain").token_bytes() for build in (bpe_byte_fallback, unigram_byte_fallback))
    byte, character = (one.index(b"e"), len(one) - 1 - one[::-1].index(b"e"))
    assert byte < character
    pairs = dict(zip(*(side.tolist() for side in exact_overlap(one, other)), strict=True))
    assert pairs[byte] == other.index(b"e")
    assert pairs[character] == len(other) - 1 - other[::-1].index(b"e")
    assert dict(zip(*(s.tolist() for s in exact_overlap((b"a",), (b"a", b"b", b"a"))), strict=True)) == {0: 2}
    assert nearest_tokens((b"a", b"b", b"a"), (b"a",)).tolist() == [0, 0, 0]


def test_large_maps_are_stored(monkeypatch, tmp_path):
    """The map of two large vocabularies, which takes up to a minute, is stored and read again."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    source, target = ([b"%d%c" % (n, letter) for n in range(4000)] for letter in b"ab")
    expected = nearest_tokens(source, target)
    (path,) = tmp_path.rglob("*.safetensors")
    assert list(tmp_path.rglob("*")) == [path.parent, path]
    assert torch.equal(nearest_tokens(source, target), expected)
    save_file({"nearest": load_file(path)["nearest"] + 1}, path)  # changed, to check that the file is read
    assert torch.equal(nearest_tokens(source, target, (0, 3))[1:], expected[1:] + 1)
    nearest_tokens(source[:50], target[:40])
    assert list(tmp_path.rglob("*.safetensors")) == [path]


def test_an_end_token_is_not_matched_by_its_spelling():
    """An end token that is not special is paired with the other end token only, not by its spelling."""
    mine, theirs = exact_overlap((b"a", b"<e>", b"b"), (b"<e>", b"a"), (1, 0))
    assert (mine.tolist(), theirs.tolist()) == ([0, 1], [1, 0])
    mine, theirs = exact_overlap((b"a", b"<e>", b"b"), (b"<e>", b"a", None), (1, 2))
    assert (mine.tolist(), theirs.tolist()) == ([0, 1], [1, 2])


TEXTS = [
    "hello",
    "hell",
    "shell",
    "yellow",
    "",
    "word",
    "wordy",
    "你好",
    "你好吗",
    "0",
    "00",
    "000",
    "-" * 70,
    "-" * 64,
    None,
]


def nearest(text, others, threshold):
    """Return the index of the first text of least distance below the threshold."""
    best, place = threshold, None
    for index, other in enumerate(others):
        if text is not None and other is not None:
            ratio = Levenshtein.distance(text, other) / max(len(text) + len(other), 1)
            if ratio < best:
                best, place = ratio, index
    return place


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
def test_each_candidate_gets_the_nearest_at_its_position(data, threshold):
    """Each candidate is matched with the nearest candidate at the same position."""
    vocabularies = [data.draw(st.permutations(TEXTS)) for _ in range(2)]
    tops = [
        np.array([data.draw(st.permutations(range(len(TEXTS))))[:size] for _ in range(2)], np.int64) for size in (7, 9)
    ]
    found = CandidateMatcher(*vocabularies, threshold)(*tops)
    for place in range(2):
        texts = [[words[index] for index in top[place]] for words, top in zip(vocabularies, tops, strict=True)]
        for side, other in ((0, 1), (1, 0)):
            expected = [nearest(text, texts[side], threshold) for text in texts[other]]
            ids = [NONE if index is None else tops[side][place, index] for index in expected]
            assert found[side][place].tolist() == ids
