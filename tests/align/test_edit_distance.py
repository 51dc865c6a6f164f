"""Test dynamic time warping over edit distances against its definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dwakd.align.edit_distance import MANY, edit_costs, one_to_one_rows, warped_runs, warping_path

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


def cost_of_path(costs: np.ndarray) -> int:
    return int(costs[tuple(warping_path(costs).T)].sum())


@settings(max_examples=80, deadline=None)
@given(student=TOKENS, teacher=TOKENS)
def test_the_path_is_monotone_covers_both_ends_and_is_cheapest(student, teacher):
    """The path is monotone, goes from the first to the last cell and has the least cost."""
    costs = edit_costs(student, teacher)
    rows, back = one_to_one_rows(costs), np.ascontiguousarray(costs.T)
    assert cost_of_path(costs) == least_cost(costs) == cost_of_path(back)
    single = [row for row in rows.tolist() if row != MANY]
    assert single == sorted(single)
    assert set(single) <= set(range(len(teacher)))
    assert rows[0] in (0, MANY)
    assert rows[-1] in (len(teacher) - 1, MANY)


@settings(max_examples=30, deadline=None)
@given(tokens=TOKENS)
def test_identical_sequences_pair_row_by_row(tokens):
    """In two equal sequences, each token is paired with itself."""
    costs = edit_costs(tokens, tokens)
    assert one_to_one_rows(costs).tolist() == list(range(len(tokens)))
    assert cost_of_path(costs) == 0


def test_ties_prefer_the_diagonal_then_the_teacher():
    """Among equally cheap steps, the order of the published code is used."""
    assert one_to_one_rows(np.zeros((2, 3), np.int32)).tolist() == [MANY, 2]
    assert one_to_one_rows(np.zeros((3, 2), np.int32)).tolist() == [0, 0, 1]
    costs = np.array([[0, 0, 0], [0, 9, 0], [0, 0, 0]], np.int32)
    assert one_to_one_rows(costs).tolist() == [0, 0, MANY]


@settings(max_examples=80, deadline=None)
@given(student=TOKENS, teacher=TOKENS)
def test_runs_cover_both_sides_and_hold_the_path(student, teacher):
    """Every token is in exactly one run, and the runs contain the cheapest path."""
    costs = edit_costs(student, teacher)
    runs, rows = warped_runs(costs), one_to_one_rows(costs)
    for side, tokens in zip(runs, (student, teacher), strict=True):
        assert side.sum() == len(tokens)
        assert side.min() > 0
    assert np.minimum(*runs).max() == 1
    starts = [side.cumsum() - side for side in runs]
    # the path steps diagonally between runs, and is the cheapest path from corner to corner within a run
    blocks = [costs[i : i + n, j : j + m] for i, j, n, m in zip(*starts, *runs, strict=True)]
    assert sum(least_cost(block) for block in blocks) == cost_of_path(costs)
    for i, j, n, m in zip(*starts, *runs, strict=True):
        assert all(row == MANY or j <= row < j + m for row in rows[i : i + n])


def test_runs_by_hand():
    """A token that is paired with two tokens of the other side forms one run with them."""
    for student, teacher, expected in (
        (["a", "bb", "cc"], ["a", "bb", "cc", "cc"], ([1, 1, 1], [1, 1, 2])),
        (["the", "cat", "cat"], ["the", "cat"], ([1, 2], [1, 1])),
    ):
        assert tuple(run.tolist() for run in warped_runs(edit_costs(student, teacher))) == expected
