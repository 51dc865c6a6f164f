"""Compute Soft-DTW for any costs, one cell at a time in float64: the exact path of the CPU kernel.

It is used for float64, infinite costs, and costs far above gamma. It reads and writes numpy arrays. All functions are
in one file, because numba's cache on disk detects changes of the compiled file only. `no_type_check` prevents the
tests' shape checker from wrapping the compiled functions.
"""

import math
from typing import no_type_check

import numpy as np

from dwakd.kernels.compiled import compiled_by_numba


@compiled_by_numba
@no_type_check
def _forward_exact(cost, n, m, gamma, weights):
    """Return the cost at the end, and store the weights of each cell's predecessors: above, left, above left."""
    row = np.full(m + 1, np.inf)  # accumulated costs of the row above, overwritten by those of this row
    row[0] = 0.0  # the corner before the first cell
    for i in range(n):
        corner, left = row[0], np.inf
        row[0] = np.inf
        for j in range(m):
            up = row[j + 1]
            lowest = min(up, left, corner)
            finite = min(lowest, 1e300)  # if all three are unreachable, exponents are -inf, not NaN
            a = math.exp((finite - up) / gamma)
            b = math.exp((finite - left) / gamma)
            c = math.exp((finite - corner) / gamma)
            rest = min(a, b) + min(max(a, b), c)
            weights[i, j, 0], weights[i, j, 1], weights[i, j, 2] = a / (1 + rest), b / (1 + rest), c / (1 + rest)
            left = cost[i, j] + (lowest - gamma * math.log1p(rest))
            row[j + 1], corner = left, up
    return row[m]


@compiled_by_numba
@no_type_check
def _backward_exact(grad, n, m, weights):
    """Compute the gradients: the probability that a path, drawn by the weights, passes through each cell."""
    downwards, corners = np.zeros(m), np.zeros(m)  # probabilities that arrive from the row below
    for i in range(n - 1, -1, -1):
        sideways, corner = 0.0, 0.0
        if i == n - 1:
            sideways = 1.0  # every path ends in the last cell
        for j in range(m - 1, -1, -1):
            arriving = downwards[j] + sideways + corners[j]
            grad[i, j] = arriving
            downwards[j], sideways = arriving * weights[i, j, 0], arriving * weights[i, j, 1]
            corners[j], corner = corner, arriving * weights[i, j, 2]


@compiled_by_numba
@no_type_check
def _is_valid(cost, n, m):
    """Return whether no cost is NaN or -inf."""
    for i in range(n):
        for j in range(m):
            if not cost[i, j] > -np.inf:
                return False
    return True


@compiled_by_numba
@no_type_check
def solve_exact(cost, x_lengths, y_lengths, gamma, keep, value, grad, is_open, first_row, last_row):
    """Compute values and, if `keep` is true, gradients of the examples first_row to last_row - 1 that are open."""
    for row in range(first_row, last_row):
        if not is_open[row]:
            continue
        n, m = x_lengths[row], y_lengths[row]
        value[row] = np.nan
        if keep:
            grad[row] = 0.0
        if _is_valid(cost[row], n, m):
            weights = np.empty((n, m, 3))
            value[row] = _forward_exact(cost[row], n, m, gamma, weights)
            if keep and value[row] < np.inf:
                _backward_exact(grad[row], n, m, weights)
        elif keep:
            grad[row, :n, :m] = np.nan
