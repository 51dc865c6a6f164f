"""Compute Soft-DTW on the CPU with numba, in parallel over the batch, and each gradient together with its value.

Moderate float32 costs take the fast path, one anti-diagonal after the other, in loops that LLVM vectorises. It stores
differences of the accumulated cost R between neighbours, in units of gamma: the step down into a cell,
R[i, j] - R[i - 1, j], by row, and the step right, R[i, j] - R[i, j - 1], by column. R grows along a path, but these
differences stay small enough for float32. Other costs take the exact path, one cell at a time in float64.

The costs are those of a band: row i holds the columns from starts[i] on, and the full table is a band that starts at 0.
Cells outside the band are unreachable. As the starts do not decrease, the rows of a diagonal are consecutive.

The weights of a cell are the probabilities of its three predecessors on a path. The flow of a cell is its gradient: the
probability that a path passes through it.

LLVM vectorises a loop only if it uses few arrays, which it must prove not to overlap, and unsigned indices. All
compiled functions are in one file, because numba's cache on disk detects changes of the compiled file only.
`no_type_check` prevents the tests' shape checker from wrapping them.
"""

import functools
import math
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import float32, uint64
from torch import Tensor

from dwakd.kernels.compiled import compiled_by_numba, share

fused = functools.partial(compiled_by_numba, fastmath={"contract"})  # allows fused multiply-add instructions

_CELLS_PER_THREAD = 100_000  # about half a millisecond; with less work, a second thread saves no time
_PAD = 16  # the length of a diagonal is rounded up to a multiple of this, so that all its cells fill vectors
_LIMIT = 4.0  # largest cost, in units of gamma; with larger ones, rounding errors in the gradient reach 1e-6
_LEAST_FLOW = 1e-30  # smaller gradients become 0, because denormal numbers slow down later matrix products
_FAR = float32(1e9)  # distance of a cell outside the band, in units of gamma
_ZERO, _ONE, _TWO, _NEXT = float32(0), float32(1), float32(2), uint64(1)
_FLOOR, _LOG2_E, _ROUND = float32(-87), float32(1.4426950408889634), float32(1.5 * 2**23)
_LN2_HIGH, _LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)
# exp(r) for |r| <= ln 2 / 2 after Cephes' expf, without the two leading terms 1 + r
_E2, _E3, _E4 = float32(5.0000001201e-1), float32(1.6666665459e-1), float32(4.1665795894e-2)
_E5, _E6, _E7 = float32(8.3334519073e-3), float32(1.3981999507e-3), float32(1.9875691500e-4)
# 2 artanh(z) / z in z^2 for 0 <= z <= 1 / 2: a Chebyshev fit with a relative error of 2e-8
_A0, _A1, _A2 = float32(2.0), float32(0.6666779575976), float32(0.3994882271805)
_A3, _A4, _A5 = float32(0.2940806106697), float32(0.1620839772365), float32(0.3675323923349)


def solve(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
    keep: bool,
    starts: Int[Tensor, "batch n"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """Compute the values and, if `keep`, their gradients (else an empty tensor); equal for any number of threads."""
    if starts is None:
        starts = x_lengths.new_zeros(cost.shape[:2])
    lengths = [side.long().contiguous().numpy() for side in (x_lengths, y_lengths, starts)]
    value, grad = cost.new_empty(len(cost)), cost.new_empty(cost.shape if keep else (0, 0, 0))
    arguments = cost.detach().contiguous().numpy(), *lengths, gamma, keep, value.numpy(), grad.numpy()
    num_threads = min(torch.get_num_threads(), cost.numel() // _CELLS_PER_THREAD)
    spans = [(row, row + 1) for row in range(len(cost))] if num_threads > 1 else [(0, len(cost))]
    share(lambda first, last: _solve(*arguments, first, last), spans, num_threads)
    return value, grad


@fused
@no_type_check
def _exp(x):
    """Compute exp(x) = 2^k exp(r) for x <= 0, within 1e-7 (relative); 1 at 0, 0 from -87 down."""
    y = max(x, _FLOOR)
    shifted = float32(y * _LOG2_E + _ROUND)  # rounds to an integer and stores it in the low bits
    k = shifted - _ROUND
    r = y - k * _LN2_HIGH - k * _LN2_LOW
    p = ((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2
    p = float32(p * (r * r) + r + _ONE)
    bits = p.view(np.int32) + (shifted.view(np.int32) << np.int32(23))
    return np.int32(bits).view(float32) if y > _FLOOR else _ZERO


@fused
@no_type_check
def _forward_diagonal(downs, i, rights, j, weights, above, count):
    """Compute the cells of a diagonal.

    `downs[i ...]` contains the steps down into the cells on the left, `rights[j ...]` the steps right into the cells
    above; both are overwritten by the steps into the cells themselves. `weights[above ...]` contains the costs and is
    overwritten by the weights of the predecessors above; those on the left follow. The third weight is 1 minus the other two.
    """
    i, j, above, count = uint64(i), uint64(j), uint64(above), uint64(count)
    beside = above + count
    for t in range(count):
        # accumulated costs above and on the left, minus that at the corner; then these two and 0 in order
        up, left, cost = rights[j + t], downs[i + t], weights[above + t]
        low, high = min(up, left), max(up, left)
        lowest, middle, highest = min(low, _ZERO), max(low, min(high, _ZERO)), max(high, _ZERO)
        second, third = _exp(lowest - middle), _exp(lowest - highest)
        rest = second + third
        first = _ONE / (_ONE + rest)
        second, third = second * first, third * first
        weights[above + t] = first if up == lowest else (second if up == middle else third)
        weights[beside + t] = first if left == lowest else (second if left == middle else third)
        z = rest / (rest + _TWO)  # log(1 + rest) = 2 artanh(z)
        s = z * z
        step = cost - (((((_A5 * s + _A4) * s + _A3) * s + _A2) * s + _A1) * s + _A0) * z
        downs[i + t] = step + (lowest - up)
        rights[j + t] = step + (lowest - left)


@compiled_by_numba
@no_type_check
def _diagonals(n, m, width, starts):
    """Return the first row of each diagonal, the row after its last one, and the index of the first cell of each row.

    The cell of row i on diagonal k has the index that is returned for row i, plus k.
    """
    firsts, ends, origins = np.empty(n + m - 1, np.int64), np.empty(n + m - 1, np.int64), np.empty(n, np.int64)
    origins[:] = np.arange(n) * (width - 1) - starts[:n]
    first, end = 0, 1
    for k in range(n + m - 1):
        while first + min(starts[first] + width, m) <= k:
            first += 1
        while end < n and end + starts[end] <= k:
            end += 1
        firsts[k], ends[k] = first, end
    return firsts, ends, origins


@compiled_by_numba
@no_type_check
def _padded(count):
    return (count + _PAD - 1) // _PAD * _PAD


@fused
@no_type_check
def _forward_fast(cells, n, m, diagonals, inverse, keep, weights):
    """Return the cost at the end, in units of gamma, and the end of the weights, stored for all cells if `keep`."""
    # rows in order and columns in reverse, so that a diagonal runs forward through both
    downs, rights = np.full(n + _PAD, _FAR), np.full(m + _PAD, _FAR)
    firsts, ends, origins = diagonals
    start, total, last_end = _PAD, cells[0] * inverse, 1
    inverse = float32(inverse)
    for k in range(n + m - 1):
        first, end = firsts[k], ends[k]
        padded, column, diagonal = _padded(end - first), m - 1 - k + first, uint64(k)
        for t in range(uint64(first), uint64(end)):
            weights[uint64(start - first) + t] = cells[uint64(origins[t]) + diagonal] * inverse
        if end > last_end:
            downs[end - 1] = _FAR
        _forward_diagonal(downs, first, rights, column, weights, start, padded)
        if k > 0:  # follow the last row of each diagonal to the end
            total += downs[end - 1] if end > last_end else rights[column + end - first - 1]
        last_end = end
        if keep:
            start += 2 * padded
    return total, start


@fused
@no_type_check
def _backward_diagonal(flows, now, before, earlier, weights, above, beside, count):
    """Add the flows (gradients) of a diagonal to those of the previous one, and write those into the corners.

    `flows[now ...]`, `flows[before ...]` and `flows[earlier ...]` are the flows of three consecutive diagonals, each
    from the same row on. They are in float64, and the corner gets the remainder, so almost no flow is lost.
    """
    now, before, earlier = uint64(now), uint64(before), uint64(earlier)
    above, beside = uint64(above), uint64(beside)
    for t in range(uint64(count)):
        below = flows[now + t + _NEXT]
        upwards = below * weights[above + t + _NEXT]
        flows[earlier + t] = below - upwards - below * weights[beside + t + _NEXT]
        arriving = flows[before + t] + upwards + flows[now + t] * weights[beside + t]
        flows[before + t] = arriving if arriving > _LEAST_FLOW else 0.0


@fused
@no_type_check
def _backward_fast(cells, n, m, diagonals, weights, start):
    """Write the probability that a path, drawn by the weights, passes through each cell; `start` is their end."""
    firsts, ends, origins = diagonals
    size = n + _PAD + 2
    # rows before the first of a diagonal are not written as k decreases, so they are 0
    flows = np.zeros(3 * size)
    now, before, earlier = 0, size, 2 * size
    flows[n - 1] = 1.0  # every path ends in the last cell
    for k in range(n + m - 2, -1, -1):
        first, end = firsts[k], ends[k]
        plane = _padded(end - first)
        start -= 2 * plane
        for t in range(uint64(first), uint64(end)):
            cells[uint64(origins[t]) + uint64(k)] = flows[uint64(now) + t]
        flows[now + end] = 0.0  # left over from an earlier diagonal
        row = max(0, first - 1)
        above = start + row - first
        _backward_diagonal(
            flows, now + row, before + row, earlier + row, weights, above, above + plane, _padded(end - row)
        )
        now, before, earlier = before, earlier, now


@compiled_by_numba
@no_type_check
def _are_within(cost, n, m, starts, least, most):
    """Return whether all costs of the example are between two limits; False if one is NaN."""
    for i in range(n):
        num_within, count = 0, min(cost.shape[1], m - starts[i])
        for j in range(count):  # LLVM vectorises a count, but not a maximum
            num_within += (cost[i, j] >= least) & (cost[i, j] <= most)
        if num_within < count:
            return False
    return True


@compiled_by_numba
@no_type_check
def _forward_exact(cost, n, m, starts, gamma, weights):
    """Return the cost at the end, and store the weights of each cell's predecessors: above, left, above left."""
    row = np.full(m + 1, np.inf)  # accumulated costs of the row above, overwritten by those of this row
    row[0] = 0.0  # the corner before the first cell
    for i in range(n):
        start = starts[i]
        corner, left = row[start], np.inf
        row[start] = np.inf
        for t in range(min(cost.shape[1], m - start)):
            up = row[start + t + 1]
            lowest = min(up, left, corner)
            finite = min(lowest, 1e300)  # if all three are unreachable, exponents are -inf, not NaN
            a = math.exp((finite - up) / gamma)
            b = math.exp((finite - left) / gamma)
            c = math.exp((finite - corner) / gamma)
            rest = min(a, b) + min(max(a, b), c)
            weights[i, t, 0], weights[i, t, 1], weights[i, t, 2] = a / (1 + rest), b / (1 + rest), c / (1 + rest)
            left = cost[i, t] + (lowest - gamma * math.log1p(rest))
            row[start + t + 1], corner = left, up
    return row[m]


@compiled_by_numba
@no_type_check
def _backward_exact(grad, n, m, starts, weights, value):
    """Write the probability that a path passes through each cell: 0 if `value` is +inf, and NaN if it is NaN."""
    # probabilities that arrive from the row below; corners[j + 1] is that of column j
    downwards, corners = np.zeros(m), np.zeros(m + 1)
    for i in range(n - 1, -1, -1):
        sideways, corner, start = 0.0, 0.0, starts[i]
        if i == n - 1:
            sideways = 1.0 if value < np.inf else 0.0 / value  # every path ends in the last cell
        for t in range(min(grad.shape[1], m - start) - 1, -1, -1):
            j = start + t
            arriving = downwards[j] + sideways + corners[j + 1]
            grad[i, t] = arriving
            downwards[j], sideways = arriving * weights[i, t, 0], arriving * weights[i, t, 1]
            corners[j + 1], corner = corner, arriving * weights[i, t, 2]
        corners[start] = corner


@compiled_by_numba
@no_type_check
def _num_weights(diagonals, keep):
    """Return the number of weights to store; flows of 0 are multiplied by weights up to _PAD before or after."""
    total, largest = 0, 0
    for k in range(len(diagonals[0])):
        count = 2 * _padded(diagonals[1][k] - diagonals[0][k])
        total, largest = total + count, max(largest, count)
    return (total if keep else largest) + 4 * _PAD


@compiled_by_numba
@no_type_check
def _solve(cost, x_lengths, y_lengths, starts, gamma, keep, value, grad, first_row, last_row):
    """Compute the values of examples first_row to last_row - 1 and, if `keep`, the gradients."""
    width = cost.shape[2]
    limit = float32(min(_LIMIT * gamma, 1e38)) if cost.itemsize == 4 else float32(-1)
    weights = np.empty(0, float32)
    for row in range(first_row, last_row):
        n, m, begins = x_lengths[row], y_lengths[row], starts[row]
        if keep:
            grad[row, n:] = 0.0
            for i in range(n):
                grad[row, i, m - begins[i] :] = 0.0
        if _are_within(cost[row], n, m, begins, -limit, limit):
            diagonals = _diagonals(n, m, width, begins)
            size = _num_weights(diagonals, keep)
            if size > len(weights):
                weights = np.zeros(size, float32)
            reached, used = _forward_fast(cost[row].reshape(-1), n, m, diagonals, 1.0 / gamma, keep, weights)
            value[row] = reached * gamma
            if keep:
                _backward_fast(grad[row].reshape(-1), n, m, diagonals, weights, used)
        else:
            exact_weights = np.empty((n, min(width, m), 3))
            value[row] = _forward_exact(cost[row], n, m, begins, gamma, exact_weights)
            if not _are_within(cost[row], n, m, begins, -1.7e308, np.inf):
                value[row] = np.nan
            if keep:
                _backward_exact(grad[row], n, m, begins, exact_weights, value[row])
