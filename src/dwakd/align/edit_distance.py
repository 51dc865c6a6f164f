"""Pair two token sequences by dynamic time warping with the edit distance as cost (MinED, CDM)."""

from collections.abc import Sequence
from typing import no_type_check

import numba
import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

Costs = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int32]

MANY, NONE = -2, -1


def edit_costs(student: Sequence[str], teacher: Sequence[str]) -> Costs:
    """Compute the Levenshtein distance of every student token to every teacher token."""
    distances: Costs = cdist(student, teacher, scorer=Levenshtein.distance, dtype=np.int32)
    return distances


def one_to_one_rows(costs: Costs) -> tuple[Rows, int]:
    """Find, for each student token, the only teacher token that the cheapest monotone path pairs it with.

    The path runs from the first to the last cell of the costs. It is traced back from the end; among equally cheap
    steps it prefers the diagonal, then the step along the teacher, then the step along the student.

    Args:
        costs: (student tokens, teacher tokens), with at least one of each.

    Returns:
        The index of the teacher token for each student token, `MANY` where the path pairs it with several, and the
        cost of the path.
    """
    return _path(costs)


def warped_runs(costs: Costs) -> tuple[Rows, Rows]:
    """Cut the path of `one_to_one_rows` at its diagonal steps into runs of tokens that are paired with each other.

    Args:
        costs: (student tokens, teacher tokens), with at least one of each; no cost is negative.

    Returns:
        The number of student tokens and the number of teacher tokens of each run, in order. At least one of the two is
        1, because a path around a corner is never cheaper than the diagonal.
    """
    return _runs(costs)


@no_type_check
def _totals_of(costs):
    """Compute the cost of the cheapest path to each cell, with a border before the first row and column."""
    n, m = costs.shape
    total = np.full((n + 1, m + 1), np.iinfo(np.int64).max // 2)
    total[0, 0] = 0
    for i in range(n):
        for j in range(m):
            total[i + 1, j + 1] = costs[i, j] + min(total[i, j], total[i + 1, j], total[i, j + 1])
    return total


@no_type_check
def _cell_before(total, i, j):
    best = min(total[i - 1, j - 1], total[i, j - 1], total[i - 1, j])
    if total[i - 1, j - 1] == best:
        return i - 1, j - 1
    return (i, j - 1) if total[i, j - 1] == best else (i - 1, j)


_totals = numba.njit(nogil=True)(_totals_of)
_before = numba.njit(nogil=True)(_cell_before)


@no_type_check
def _one_to_one_rows(costs):
    total = _totals(costs)
    i, j = costs.shape
    rows = np.full(i, NONE, np.int32)
    while i > 0 and j > 0:
        rows[i - 1] = j - 1 if rows[i - 1] == NONE else MANY
        i, j = _before(total, i, j)
    return rows, total[costs.shape]


@no_type_check
def _warped_runs(costs):
    total = _totals(costs)
    i, j = costs.shape
    student, teacher = np.zeros(min(i, j), np.int32), np.zeros(min(i, j), np.int32)
    run, end = 0, (i, j)
    while i > 0 and j > 0:
        before = _before(total, i, j)
        if before[0] < i and before[1] < j:
            student[run], teacher[run] = end[0] - before[0], end[1] - before[1]
            run, end = run + 1, before
        i, j = before
    return student[:run][::-1].copy(), teacher[:run][::-1].copy()


_path = numba.njit(nogil=True)(_one_to_one_rows)
_runs = numba.njit(nogil=True)(_warped_runs)
