"""Exact token alignment: what may be paired, and what must not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwakd.align.offsets import exact_rows
from tests.losses.reference_v2 import text_pairs


def partners(student: list[list[int]], teacher: list[list[int]]) -> list[int]:
    """Of a batch given as byte ends per example."""
    ends = [torch.tensor([end for example in side for end in example], dtype=torch.long) for side in (student, teacher)]
    lengths = [torch.tensor([len(example) for example in side]) for side in (student, teacher)]
    return exact_rows(ends[0], lengths[0], ends[1], lengths[1]).tolist()


def test_pairs_of_the_specification():
    """The|cat|a..|..|is|new and The|catal|....|is|new: (teacher, student) = (0, 0), (4, 3), (5, 4)."""
    assert partners([[3, 8, 12, 14, 17]], [[3, 6, 10, 12, 14, 17]]) == [0, -1, -1, 4, 5]


def test_identical_tokenizers_pair_every_token():
    """Tokens without bytes included: a mark of SentencePiece in front, the end of the text behind."""
    ends = [[0, 0, 3, 7, 7, 9, 9], [2], [0, 0]]
    assert partners(ends, ends) == list(range(10))


def test_examples_are_never_crossed():
    """Equal spans of different examples hold different texts (a flattened batch pairs them)."""
    assert partners([[3, 5], [3, 5]], [[1, 5], [3, 5]]) == [-1, -1, 2, 3]
    assert partners([[4], [2, 4]], [[2, 4], [4]]) == [-1, -1, -1]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([3, 5, 5], [5, 5], [-1, -1, 1]),
        ([5, 5], [3, 5, 5, 5], [-1, 3]),
        ([5, 5], [5, 5, 5], [0, 2]),
        ([5], [5, 5], [0]),
        ([0, 4, 4], [4, 4], [-1, 0, 1]),
        ([0, 0, 4], [0, 4], [-1, 0, 1]),
    ],
)
def test_end_of_sequence_meets_end_of_sequence(student, teacher, expected):
    """The end token covers nothing; it must not pair with a mark of normalisation, nor be lost beside one."""
    assert partners([student], [teacher]) == expected


def test_an_empty_side_has_no_partner():
    """A batch without teacher rows must not index into nothing."""
    assert partners([[1, 2], []], [[], []]) == [-1, -1]


token_ends = st.lists(st.integers(0, 3), min_size=0, max_size=9).map(
    lambda sizes: torch.tensor(sizes).cumsum(0).tolist()
)
batches = st.integers(1, 4).flatmap(
    lambda count: st.tuples(*[st.lists(token_ends, min_size=count, max_size=count) for _ in range(2)])
)


@settings(max_examples=150, deadline=None)
@given(batches)
def test_alignment_is_the_literal_one(batch):
    """Against one example at a time; also one-to-one, in order within an example, and the same from either side."""
    student, teacher = batch
    expected, offset = [], 0
    for s_ends, t_ends in zip(student, teacher, strict=True):
        found = dict(text_pairs(s_ends, t_ends))
        expected += [found[i] + offset if i in found else -1 for i in range(len(s_ends))]
        offset += len(t_ends)
    got = partners(student, teacher)
    assert got == expected
    kept = [j for j in got if j >= 0]
    assert kept == sorted(set(kept))
    back = partners(teacher, student)
    assert [(i, j) for i, j in enumerate(got) if j >= 0] == sorted((i, j) for j, i in enumerate(back) if i >= 0)
