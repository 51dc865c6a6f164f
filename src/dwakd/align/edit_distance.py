"""Token sequences paired by spelling: dynamic time warping with the edit distance as cost (MinED)."""

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


@no_type_check
def _one_to_one_rows(costs):
    n, m = costs.shape
    total = np.full((n + 1, m + 1), np.iinfo(np.int64).max // 2)
    total[0, 0] = 0
    for i in range(n):
        for j in range(m):
            total[i + 1, j + 1] = costs[i, j] + min(total[i, j], total[i + 1, j], total[i, j + 1])
    rows = np.full(n, NONE, np.int32)
    i, j = n, m
    while i > 0 and j > 0:
        rows[i - 1] = j - 1 if rows[i - 1] == NONE else MANY
        best = min(total[i - 1, j - 1], total[i, j - 1], total[i - 1, j])
        if total[i - 1, j - 1] == best:
            i, j = i - 1, j - 1
        elif total[i, j - 1] == best:
            j -= 1
        else:
            i -= 1
    return rows, total[n, m]


_path = numba.njit(nogil=True)(_one_to_one_rows)
