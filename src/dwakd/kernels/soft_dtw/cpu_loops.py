"""The compiled loops of the CPU kernel: numpy arrays in, numpy arrays out, no torch.

The arrays of one diagonal hold cell i at index i + 1; index 0 is the row before the first. Weights lie in
blocks, one per diagonal: three planes (of the predecessor above, left, above left) of the diagonal's cells padded to a
multiple of LANES. Padding cells are unreachable and pass nothing on.

`no_type_check` keeps the tests' shape checker from wrapping what numba compiles.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np
from numba import types
from numba.extending import overload

from dwakd.kernels.soft_dtw.simd import LANES, backward_lanes, forward_lanes

logger = logging.getLogger(__name__)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit with an on-disk cache where a folder for it is writable, and without one elsewhere."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba: "no locator available"
        logger.info("Soft-DTW is compiled anew in each process: %s.", error)
        compiled = numba.njit(**options)(function)
    return compiled


# --- one diagonal: vectors in float32, a plain loop with libm's functions in float64 ---------------------------------


def _forward_diagonal(
    gamma: float, cost: Any, before: Any, last: Any, now: Any, weights: Any, start: int, first: int, padded: int
) -> None:
    """Costs reached on the diagonal whose first cell is in row `first`, and their weights."""


@overload(_forward_diagonal)
@no_type_check
def _forward_diagonal_of(gamma, cost, before, last, now, weights, start, first, padded):  # type: ignore[no-untyped-def]
    def float32(gamma, cost, before, last, now, weights, start, first, padded):  # type: ignore[no-untyped-def]
        inverse = 1.0 / gamma
        for t in range(0, padded, LANES):
            forward_lanes(
                last.ctypes.data + np.uintp(8 * (first + t)),
                before.ctypes.data + np.uintp(8 * (first + t)),
                cost.ctypes.data + np.uintp(4 * t),
                now.ctypes.data + np.uintp(8 * (first + 1 + t)),
                weights.ctypes.data + np.uintp(4 * (start + t)),
                np.uintp(4 * padded),
                gamma,
                inverse,
            )

    def float64(gamma, cost, before, last, now, weights, start, first, padded):  # type: ignore[no-untyped-def]
        for t in range(padded):
            up, left, corner = last[first + t], last[first + t + 1], before[first + t]
            lowest = min(up, left, corner)
            finite = min(lowest, 1e300)
            a = math.exp((finite - up) / gamma)
            b = math.exp((finite - left) / gamma)
            c = math.exp((finite - corner) / gamma)
            rest = min(a, b) + min(max(a, b), c)
            weights[start + t] = a / (1.0 + rest)
            weights[start + padded + t] = b / (1.0 + rest)
            weights[start + 2 * padded + t] = c / (1.0 + rest)
            now[first + 1 + t] = cost[t] + (lowest - gamma * math.log1p(rest))

    return float32 if weights.dtype is types.float32 else float64


def _backward_diagonal(
    ups: Any, lefts: Any, corners: Any, weights: Any, start: int, first: int, padded: int, flow: Any
) -> None:
    """Flow through the diagonal's cells, and what they pass on."""


@overload(_backward_diagonal)
@no_type_check
def _backward_diagonal_of(ups, lefts, corners, weights, start, first, padded, flow):  # type: ignore[no-untyped-def]
    def float32(ups, lefts, corners, weights, start, first, padded, flow):  # type: ignore[no-untyped-def]
        for t in range(0, padded, LANES):
            backward_lanes(
                ups.ctypes.data + np.uintp(8 * (first + 1 + t)),
                lefts.ctypes.data + np.uintp(8 * (first + 1 + t)),
                corners.ctypes.data + np.uintp(8 * (first + 1 + t)),
                weights.ctypes.data + np.uintp(4 * (start + t)),
                np.uintp(4 * padded),
                flow.ctypes.data + np.uintp(8 * t),
            )

    def float64(ups, lefts, corners, weights, start, first, padded, flow):  # type: ignore[no-untyped-def]
        for t in range(padded):
            i = first + 1 + t
            arriving = ups[i + 1] + lefts[i] + corners[i + 1]
            flow[t] = arriving
            ups[i] = arriving * weights[start + t]
            lefts[i] = arriving * weights[start + padded + t]
            corners[i] = arriving * weights[start + 2 * padded + t]

    return float32 if weights.dtype is types.float32 else float64


# --- whole examples ---------------------------------------------------------------------------------------------------


@_compiled
@no_type_check
def forward_batch(gamma, cost, lengths, keep, weights, starts, value, first_row, last_row):  # type: ignore[no-untyped-def]
    """Values of the examples first_row to last_row - 1, and their weights where `keep`."""
    width, size = cost.shape[2], cost.shape[1] + 2 + LANES
    before, last, now = np.empty(size), np.empty(size), np.empty(size)
    slanted = np.empty(size, cost.dtype)
    for row in range(first_row, last_row):
        n, m, start = lengths[row, 0], lengths[row, 1], starts[row]
        before[:], last[:], now[:] = np.inf, np.inf, np.inf
        before[0] = 0.0  # the corner before the first cell
        cells = cost[row].reshape(-1)
        num_cells = num_valid = 0
        for k in range(n + m - 1):
            first, end = max(0, k - m + 1), min(n, k + 1)
            padded = (end - first + LANES - 1) // LANES * LANES
            slanted[end - first : padded] = np.inf
            corner = np.uintp(first * width + k - first)
            for t in range(np.uintp(end - first)):
                slanted[t] = cells[corner + t * np.uintp(width - 1)]
            for t in range(padded):
                num_valid += slanted[t] > -np.inf  # false for NaN
            num_cells += padded
            _forward_diagonal(gamma, slanted, before, last, now, weights, start, first, padded)
            now[first] = np.inf
            before, last, now = last, now, before
            if keep:
                start += 3 * padded
        value[row] = last[n] if num_valid == num_cells else np.nan


@_compiled
@no_type_check
def backward_batch(grad_value, value, lengths, weights, starts, grad_cost, first_row, last_row):  # type: ignore[no-untyped-def]
    """Gradients of the examples first_row to last_row - 1 into grad_cost, which is zero before.

    A cell's gradient is the probability of coming through it on the way back from the end, by the weights.
    """
    width, size = grad_cost.shape[2], grad_cost.shape[1] + 2 + LANES
    ups, lefts, flow = np.empty(size), np.empty(size), np.empty(size)
    corners, other_corners = np.empty(size), np.empty(size)  # of the diagonals of either parity
    for row in range(first_row, last_row):
        n, m, start = lengths[row, 0], lengths[row, 1], starts[row + 1]
        if not value[row] < np.inf:
            grad_cost[row, :n, :m] = 0.0 if value[row] == np.inf else np.nan
            continue
        ups[:], lefts[:], corners[:], other_corners[:] = 0.0, 0.0, 0.0, 0.0
        cells, scale = grad_cost[row].reshape(-1), grad_value[row]
        corners[n + 1] = 1.0  # arrives at the last cell
        for k in range(n + m - 2, -1, -1):
            first, end = max(0, k - m + 1), min(n, k + 1)
            padded = (end - first + LANES - 1) // LANES * LANES
            start -= 3 * padded
            _backward_diagonal(ups, lefts, corners, weights, start, first, padded, flow)
            corner = np.uintp(first * width + k - first)
            for t in range(np.uintp(end - first)):
                cells[corner + t * np.uintp(width - 1)] = flow[t] * scale
            ups[first], lefts[first], corners[first] = 0.0, 0.0, 0.0
            corners, other_corners = other_corners, corners
