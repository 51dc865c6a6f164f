"""Dynamic time warping over edit distances, against its definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dwakd.align.edit_distance import MANY, edit_costs, one_to_one_rows

TOKENS = st.lists(
    st.sampled_from(["the", "cat", "ca", "t", "alogue", "is", "", "你好", "new", "n"]), min_size=1, max_size=9
)


def least_cost(costs: np.ndarray) -> int:
    n, m = costs.shape
    total = np.full((n + 1, m + 1), 10**6)
    total[0, 0] = 0
    for i in range(n):
        for j in range(m):
            total[i + 1, j + 1] = costs[i, j] + min(total[i, j], total[i + 1, j], total[i, j + 1])
    return int(total[n, m])


@settings(max_examples=80, deadline=None)
@given(student=TOKENS, teacher=TOKENS)
def test_the_path_is_monotone_covers_both_ends_and_is_cheapest(student, teacher):
    """A row that learns from a teacher far away in the text learns noise."""
    costs = edit_costs(student, teacher)
    rows, cost = one_to_one_rows(costs)
    assert cost == least_cost(costs) == one_to_one_rows(np.ascontiguousarray(costs.T))[1]
    single = [row for row in rows.tolist() if row != MANY]
    assert single == sorted(single)
    assert set(single) <= set(range(len(teacher)))
    assert rows[0] in (0, MANY)
    assert rows[-1] in (len(teacher) - 1, MANY)


@settings(max_examples=30, deadline=None)
@given(tokens=TOKENS)
def test_identical_sequences_pair_row_by_row(tokens):
    """Same tokenizer: every position is accepted."""
    rows, cost = one_to_one_rows(edit_costs(tokens, tokens))
    assert rows.tolist() == list(range(len(tokens)))
    assert cost == 0


def test_ties_prefer_the_diagonal_then_the_teacher():
    """The published port's order decides which of two equal tokens is taken."""
    assert one_to_one_rows(np.zeros((2, 3), np.int32))[0].tolist() == [MANY, 2]
    assert one_to_one_rows(np.zeros((3, 2), np.int32))[0].tolist() == [0, 0, 1]
    costs = np.array([[0, 0, 0], [0, 9, 0], [0, 0, 0]], np.int32)
    assert one_to_one_rows(costs)[0].tolist() == [0, 0, MANY]
