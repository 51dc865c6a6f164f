"""Candidates matched by spelling, against the definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from dwakd.align.candidates import NONE, CandidateMatcher

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
    """The first of least distance below the threshold, as its place."""
    best, place = threshold, None
    for index, other in enumerate(others):
        if text is not None and other is not None:
            ratio = Levenshtein.distance(text, other) / max(len(text) + len(other), 1)
            if ratio < best:
                best, place = ratio, index
    return place


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
def test_each_candidate_gets_the_nearest_of_its_place(data, threshold):
    """Bounds skip most distances; one that is too tight would drop the nearest."""
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
