"""Pair two token sequences by dynamic time warping with the edit distance as cost (MinED, CDM)."""

from collections.abc import Sequence
from typing import no_type_check

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from dwakd.kernels.compiled import compiled_by_numba

Costs = NDArray[np.integer]
Rows = NDArray[np.integer]

MANY = -2


def edit_costs(student: Sequence[str], teacher: Sequence[str]) -> Costs:
    """Compute the Levenshtein distance of every student token to every teacher token."""
    distances: Costs = cdist(student, teacher, scorer=Levenshtein.distance, dtype=np.int32)
    return distances


def one_to_one_rows(costs: Costs) -> Rows:
    """Find, for each student token, the only teacher token that the cheapest path pairs it with; see `warping_path`.

    Returns:
        The index of the teacher token for each student token, or `MANY` where the path pairs it with several.
    """
    student, teacher = warping_path(costs).T
    counts = np.bincount(student)
    return np.where(counts == 1, teacher[np.cumsum(counts) - 1], MANY)


def warped_runs(costs: Costs) -> tuple[Rows, Rows]:
    """Divide both sequences into runs of tokens that the cheapest path pairs with each other.

    A new run begins at each diagonal step of the path.

    Returns:
        The number of student tokens and the number of teacher tokens of each run, in order. At least one of the two is
        1, because a path around a corner is never cheaper than the diagonal.
    """
    path = warping_path(costs)
    starts = path[np.append(True, np.diff(path, axis=0).all(axis=1))]
    student, teacher = np.diff(starts, axis=0, append=[costs.shape]).T
    return student, teacher


@no_type_check
def _warping_path(costs):
    """Find the cheapest monotone path from the first to the last cell of the costs.

    The path is traced back from the end; among equally cheap steps it prefers the diagonal, then the step along the
    teacher, then the step along the student.

    Args:
        costs: (student tokens, teacher tokens), with at least one of each; no cost is negative.

    Returns:
        The student token and the teacher token of each cell, (cells, 2).
    """
    i, j = costs.shape
    total = np.full((i + 1, j + 1), np.iinfo(np.int64).max // 2)
    total[0, 0] = 0
    for n in range(i):
        for m in range(j):
            total[n + 1, m + 1] = costs[n, m] + min(total[n, m], total[n + 1, m], total[n, m + 1])
    path = np.empty((i + j, 2), np.int64)
    start = i + j
    while i > 0 and j > 0:
        start -= 1
        path[start, 0], path[start, 1] = i - 1, j - 1
        best = min(total[i - 1, j - 1], total[i, j - 1], total[i - 1, j])
        if total[i - 1, j - 1] == best:
            i, j = i - 1, j - 1
        elif total[i, j - 1] == best:
            j -= 1
        else:
            i -= 1
    return path[start:]


warping_path = compiled_by_numba(_warping_path)
