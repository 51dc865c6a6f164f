"""Token sequences paired by spelling: dynamic time warping with the edit distance as cost (MinED, CDM)."""

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
    """Levenshtein distance of every student token to every teacher token."""
    distances: Costs = cdist(student, teacher, scorer=Levenshtein.distance, dtype=np.int32)
    return distances


def one_to_one_rows(costs: Costs) -> tuple[Rows, int]:
    """The cheapest monotone path through the costs from the first to the last cell, as one teacher row per student row.

    Of equally cheap ways back to the start it takes the diagonal, then the step along the teacher, then the step along
    the student.

    Args:
        costs: (student rows, teacher rows), neither 0.

    Returns:
        Per student row the teacher row on the path with it, `MANY` where there is more than one; and the path's cost.
    """
    return _path(costs)


def warped_runs(costs: Costs) -> tuple[Rows, Rows]:
    """The cheapest path of `one_to_one_rows`, cut at its diagonal steps into runs of rows that belong together.

    Args:
        costs: (student rows, teacher rows), neither 0; at least 0.

    Returns:
        Of each run, in order, its number of student rows and of teacher rows. The one or the other is 1: a way around a
        corner is no cheaper than the diagonal.
    """
    return _runs(costs)


@no_type_check
def _totals_of(costs):
    """The cost of the cheapest path to each cell, with a border before the first row and column."""
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
