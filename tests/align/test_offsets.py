"""Test byte groups and exact pairs against plain Python, on every kind of tokenizer and twelve scripts."""

from collections.abc import Callable
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dwakd.align.offsets import byte_groups, exact_rows, read_rows, starts
from dwakd.data.encoding import TextEncoder
from tests.data.test_encoding import ALL
from tests.losses.reference_v2 import text_pairs

SCRIPTS = {
    "latin": "Grüße aus Köln, ça va? naïve façade", "greek": "Καλημέρα κόσμε, τι κάνεις",
    "cyrillic": "Привет, мир! Ещё раз", "hebrew": "שָׁלוֹם עולם טוב", "arabic": "مرحبا بالعالم كيف",
    "devanagari": "नमस्ते दुनिया कैसे", "bengali": "ওহে বিশ্ব কেমন", "tamil": "வணக்கம் உலகம் எப்படி",
    "thai": "สวัสดีชาวโลก ทำไม", "hangul": "안녕하세요 세계 \u1112\u1161\u11ab", "han": "你好，世界。今天",
    "kana": "こんにちは、ガギ カ\u3099", 
    "other": "  \n\t e\u0301 😀👩‍👩‍👧 🇩🇪 ½ ﬁ \u00a0 def f(x):\n    return 1 </s> <0x41> ▁",
}  # fmt: skip
WORDS = [text[a:b] for text in SCRIPTS.values() for a in range(0, len(text), 3) for b in (a + 1, a + 2, a + 5)]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), min_size=1, max_size=10).map("".join)
PAIRS = [(a, b) for n, a in enumerate(ALL) for b in ALL[n % 2 :: 2]]


@cache
def encoder(build: Callable[[], PreTrainedTokenizerFast]) -> TextEncoder:
    return TextEncoder(build(), "plain")


def ends_of(build: Callable[[], PreTrainedTokenizerFast], text: str) -> list[int]:
    """Return the byte ends of a response with its end token."""
    return [*encoder(build).response_ids(text)[1], len(text.encode())]


def packed(examples: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    student, teacher = zip(*examples, strict=True)
    return tuple(
        torch.tensor(values)
        for side in (student, teacher)
        for values in (list(chain(*side)), [len(ends) for ends in side])
    )


def two_pointers(student: list[int], teacher: list[int]) -> list[tuple[list[int], list[int]]]:
    """Compute the groups by their definition: advance the side that is behind, and end a group at equal ends.

    The last tokens end the last group. A token without an offset (a negative end) is placed directly after the last
    token that has one.
    """
    groups, i, j = [], 0, 0
    first = (0, 0)
    s_places, t_places = (
        [(max(0, *ends[: n + 1]), end < 0) for n, end in enumerate(ends)] for ends in (student, teacher)
    )
    while i < len(student) and j < len(teacher):
        ends_here = (i == len(student) - 1) + (j == len(teacher) - 1)
        if ends_here == 2 or (ends_here == 0 and s_places[i] == t_places[j]):
            if ends_here == 2 or student[i] == teacher[j]:
                groups.append((list(range(first[0], i + 1)), list(range(first[1], j + 1))))
                first = (i + 1, j + 1)
            i, j = i + 1, j + 1
        elif j == len(teacher) - 1 or (i < len(student) - 1 and s_places[i] < t_places[j]):
            i += 1
        else:
            j += 1
    return groups


def check_groups(tensors: tuple[torch.Tensor, ...], examples: list[tuple[list[int], list[int]]]) -> None:
    groups = byte_groups(*tensors)
    s_starts, t_starts = starts(*tensors[:2]), starts(*tensors[2:])
    expected, s_from, t_from = [], 0, 0
    for s_ends, t_ends in examples:
        expected += [([i + s_from for i in s], [j + t_from for j in t]) for s, t in two_pointers(s_ends, t_ends)]
        s_from, t_from = s_from + len(s_ends), t_from + len(t_ends)
    got = [
        ((groups.student == g).nonzero().flatten().tolist(), (groups.teacher == g).nonzero().flatten().tolist())
        for g in range(int(groups.student.max()) + 1)
    ]
    assert got == expected
    assert list(chain(*(s for s, _ in got))) == list(range(s_from))
    assert list(chain(*(t for _, t in got))) == list(range(t_from))
    for students, teachers in got:
        assert tensors[0][students[-1]] == tensors[2][teachers[-1]]
        assert s_starts[students[0]] == t_starts[teachers[0]]
        assert groups.student_last[students].tolist() == [False] * (len(students) - 1) + [True]
        assert groups.teacher_last[teachers].tolist() == [False] * (len(teachers) - 1) + [True]


def check_exact(tensors: tuple[torch.Tensor, ...]) -> None:
    rows, back = exact_rows(*tensors).tolist(), exact_rows(*tensors[2:], *tensors[:2]).tolist()
    spans = [
        list(zip(starts(ends, lengths).tolist(), ends.tolist(), strict=True))
        for ends, lengths in (tensors[:2], tensors[2:])
    ]
    matched = [j for j in rows if j >= 0]
    assert matched == sorted(set(matched))
    assert sum(i >= 0 for i in back) == len(matched)
    assert all(back[j] == i and spans[0][i] == spans[1][j] for i, j in enumerate(rows) if j >= 0)
    if len(tensors[1]) == 1:  # only spans that cover bytes: tokens without bytes are paired by rank
        wide = {(a, b) for a, b in set(spans[0]) & set(spans[1]) if 0 <= a < b}
        assert wide <= {spans[0][i] for i, j in enumerate(rows) if j >= 0}


def last_read(student: list[int], teacher: list[int]) -> tuple[list[int], list[bool]]:
    """Compute `read_rows` of one example by its definition, comparing every pair of tokens."""
    rows, same = [], []
    starts_of = [[0, *ends[:-1]] for ends in (student, teacher)]
    for i, start in enumerate(starts_of[0]):
        behind = starts_of[0][i + 1 :].count(start)
        equal = [j for j, other in enumerate(starts_of[1]) if other == start]
        read = max(0, *starts_of[0][: i + 1])
        later = [
            j for j in range(len(teacher)) if max(0, *[e for e in teacher[j - 1 :] if e >= 0][:1] if j else [0]) <= read
        ]
        rows.append(equal[-1 - behind] if behind < len(equal) else later[-1])
        same.append(behind < len(equal))
    return rows, same


def check_read(tensors: tuple[torch.Tensor, ...], examples: list[tuple[list[int], list[int]]]) -> None:
    rows, same = read_rows(*tensors)
    first, expected = 0, []
    for s_ends, t_ends in examples:
        expected += [(row + first, match) for row, match in zip(*last_read(s_ends, t_ends), strict=True)]
        first += len(t_ends)
    assert list(zip(rows.tolist(), same.tolist(), strict=True)) == expected


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(build.__name__ for build in pair))
@settings(max_examples=6, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@example(texts=list(SCRIPTS.values()))
def test_alignment_of_two_tokenisations(pair, texts):
    """Groups, exact pairs and rows that have read the same text agree with their definitions."""
    examples = [(ends_of(pair[0], text), ends_of(pair[1], text)) for text in texts]
    examples = [(s, t) for s, t in examples if len(s) > 1 and len(t) > 1]  # no empty responses
    if examples:
        tensors = packed(examples)
        check_groups(tensors, examples)
        check_exact(tensors)
        check_read(tensors, examples)


def test_one_tokenizer_gives_single_tokens():
    """With one tokenizer, each token is a group and is paired with itself."""
    ends, lengths = torch.tensor([2, 5, 5, 1, 4, 4, 4]), torch.tensor([3, 4])
    groups = byte_groups(ends, lengths, ends, lengths)
    assert groups.student.tolist() == groups.teacher.tolist() == list(range(7))
    assert exact_rows(ends, lengths, ends, lengths).tolist() == list(range(7))


def test_the_toy_alignment_of_the_specification():
    """The pairs and groups of the specification's example are found."""
    teacher, student = torch.tensor([3, 7, 11, 13, 16, 20]), torch.tensor([3, 9, 13, 16, 20])
    lengths = torch.tensor([5]), torch.tensor([6])
    assert exact_rows(student, lengths[0], teacher, lengths[1]).tolist() == [0, -1, -1, 4, 5]
    assert byte_groups(student, lengths[0], teacher, lengths[1]).student.tolist() == [0, 1, 1, 2, 3]


def test_ends_that_never_meet_form_one_last_group():
    """An example without common ends is one group, which does not include tokens of the next example."""
    groups = byte_groups(
        torch.tensor([1, 2, 3, 2]), torch.tensor([3, 1]), torch.tensor([5, 7, 2]), torch.tensor([2, 1])
    )
    assert groups.student.tolist() == [0, 0, 0, 1]
    assert groups.teacher.tolist() == [0, 0, 1]


def partners(student: list[list[int]], teacher: list[list[int]]) -> list[int]:
    """Return the exact pairs of a batch that is given as the byte ends of each example."""
    ends = [torch.tensor([end for example in side for end in example], dtype=torch.long) for side in (student, teacher)]
    lengths = [torch.tensor([len(example) for example in side]) for side in (student, teacher)]
    return exact_rows(ends[0], lengths[0], ends[1], lengths[1]).tolist()


def test_pairs_of_the_specification():
    """Of The|cat|a..|..|is|new and The|catal|....|is|new, the pairs (teacher, student) are (0, 0), (4, 3) and (5, 4)."""
    assert partners([[3, 8, 12, 14, 17]], [[3, 6, 10, 12, 14, 17]]) == [0, -1, -1, 4, 5]


def test_identical_tokenizers_pair_every_token():
    """With one tokenizer, every token is paired, including those that cover no bytes."""
    ends = [[0, 0, 3, 7, 7, 9, 9], [2], [0, 0]]
    assert partners(ends, ends) == list(range(10))


def test_tokens_of_different_examples_are_never_paired():
    """Tokens of different examples are never paired, even if their spans are equal."""
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
def test_end_tokens_are_paired_with_each_other(student, teacher, expected):
    """The end tokens are paired with each other, although other tokens may cover no bytes at the same offset."""
    assert partners([student], [teacher]) == expected


def test_an_empty_side_has_no_partner():
    """If the teacher has no tokens, no student token is paired."""
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
    """The pairs equal those of a literal implementation, are one-to-one and in order, and do not depend on the direction."""
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
