"""Compute Soft-DTW on GPUs with Triton: one program per example computes its anti-diagonals, in blocks of rows.

The weights of a cell are the probabilities of its three predecessors on a path. The flow of a cell is its gradient: the
probability that a path passes through it. Accumulated costs, divided by gamma, and flows are in float64. Exponentials
and weights have the dtype of the costs. Cells at both ends of a diagonal that no path of finite cost reaches are
skipped, so a hard band (+inf outside) takes time for the cells inside only. The three weights of each cell are stored
diagonal by diagonal, and freed once the gradient is computed. `no_type_check` prevents the tests' shape checker from
wrapping compiled functions.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_LARGEST_BLOCK = 512  # most rows of a diagonal that are computed at once
_NOWHERE: Any = tl.constexpr(1 << 30)  # a row number above all others


@triton.jit
@no_type_check
def _lengths(x_length, y_length, num_rows, num_columns):
    """Return the lengths of an example, or zeros if one is out of range, which makes the value NaN."""
    n, m = tl.load(x_length).to(tl.int32), tl.load(y_length).to(tl.int32)
    is_right = (n >= 1) & (n <= num_rows) & (m >= 1) & (m <= num_columns)
    return tl.where(is_right, n, 0), tl.where(is_right, m, 0)


@triton.jit
@no_type_check
def _forward(
    cost, x_lengths, y_lengths, value, reached, weights, ranges, inverse_high, inverse_low, num_rows, num_columns,
    stride_example, stride_row, stride_column, keep: tl.constexpr, narrow: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0).to(tl.int64)
    n, m = _lengths(x_lengths + example, y_lengths + example, num_rows, num_columns)
    cost += example * stride_example
    reached += example * 3 * num_rows
    weights += example * 3 * num_rows * num_columns
    ranges += example * 2 * (num_rows + num_columns - 1)
    kind = weights.dtype.element_ty
    inverse_gamma = tl.full([], inverse_high, tl.float64) + tl.full([], inverse_low, tl.float64)
    lanes = tl.arange(0, block)
    bad = tl.zeros([block], tl.int32)
    start = tl.zeros([], tl.int64)
    empty = tl.full([], _NOWHERE, tl.int32)
    low_1, high_1 = empty, empty - _NOWHERE  # rows reached on the previous diagonal: from low to high - 1
    low_2, high_2 = low_1, high_1  # rows reached on the diagonal before the previous one
    end_value = tl.full([block], float("inf"), tl.float64)
    for k in range(n + m - 1):
        first, end = tl.maximum(0, k - m + 1), tl.minimum(n, k + 1)
        from_row = tl.maximum(first, tl.minimum(low_1, low_2 + 1)) * tl.minimum(k, 1)
        to_row = tl.minimum(end, tl.maximum(tl.maximum(high_1, high_2) + 1, 1 - k))
        now, last = reached + k % 3 * num_rows, reached + (k + 2) % 3 * num_rows
        before = reached + (k + 1) % 3 * num_rows
        low, high = empty, empty - _NOWHERE
        for top in range(from_row, to_row, block):
            i = top + lanes
            inside = i < to_row
            cell = cost + i.to(tl.int64) * stride_row + (k - i) * stride_column
            here = tl.load(cell, mask=inside, other=0.0).to(tl.float64)
            bad += tl.where(here > float("-inf"), 0, 1)
            up = tl.load(last + i - 1, mask=inside & (i > low_1) & (i <= high_1), other=float("inf"))
            left = tl.load(last + i, mask=inside & (i >= low_1) & (i < high_1), other=float("inf"))
            corner = tl.load(before + i - 1, mask=inside & (i > low_2) & (i <= high_2), other=float("inf"))
            corner = tl.where(i + k == 0, 0.0, corner)
            lowest = tl.minimum(tl.minimum(up, left), corner)
            finite = tl.minimum(lowest, 1e300)  # if all three are unreachable, exponents are -inf, not NaN
            a, b = tl.exp((finite - up).to(kind)), tl.exp((finite - left).to(kind))
            c = tl.exp((finite - corner).to(kind))
            total = a + b + c
            soft = lowest - tl.log(tl.maximum(total, 1.0)).to(tl.float64)
            sum_here = here * inverse_gamma + soft
            tl.store(now + i, sum_here, mask=inside)
            end_value = tl.where(inside & (i == n - 1) & (k == n + m - 2), sum_here, end_value)
            if narrow:
                alive = inside & (sum_here < float("inf"))
                low = tl.minimum(low, tl.min(tl.where(alive, i, _NOWHERE), axis=0))
                high = tl.maximum(high, tl.max(tl.where(alive, i + 1, 0), axis=0))
            if keep:
                place = weights + start + (i - first)
                share = 1.0 / tl.maximum(total, 1.0)
                tl.store(place, a * share, mask=inside)
                tl.store(place + (end - first), b * share, mask=inside)
                tl.store(place + 2 * (end - first), c * share, mask=inside)
        if narrow == 0:
            low, high = from_row, to_row
        if keep:
            tl.store(ranges + 2 * k, low)
            tl.store(ranges + 2 * k + 1, high)
        low_2, high_2, low_1, high_1 = low_1, high_1, low, high
        start += 3 * (end - first)
        tl.debug_barrier()  # the next diagonal reads what other threads have stored
    is_wrong = (tl.sum(bad, axis=0) > 0) | (n == 0)
    tl.store(value + example, tl.where(is_wrong, float("nan"), tl.min(end_value, axis=0)))


@triton.jit
@no_type_check
def _backward(
    grad, x_lengths, y_lengths, value, flows, weights, ranges, num_rows, num_columns, block: tl.constexpr
):  # fmt: skip
    example = tl.program_id(0).to(tl.int64)
    n, m = _lengths(x_lengths + example, y_lengths + example, num_rows, num_columns)
    grad += example * num_rows * num_columns
    flows += example * 3 * num_rows
    weights += example * 3 * num_rows * num_columns
    ranges += example * 2 * (num_rows + num_columns - 1)
    lanes = tl.arange(0, block)
    # the last cell has flow 1, or 0 if it cannot be reached
    value_here = tl.load(value + example)
    source = tl.where(value_here < float("inf"), 1.0, tl.where(value_here == float("inf"), 0.0, value_here))
    start_0 = 3 * n.to(tl.int64) * m  # end of the weights of this diagonal, then their start
    zero = tl.zeros([], tl.int32)
    start_1, first_1, cells_1, low_1, high_1 = start_0, zero, zero, zero, zero  # the next diagonal
    start_2, first_2, cells_2, low_2, high_2 = start_0, zero, zero, zero, zero  # the diagonal after the next one
    for step in range(n + m - 1):
        k = n + m - 2 - step
        first = tl.maximum(0, k - m + 1)
        cells = tl.minimum(n, k + 1) - first
        start_0 -= 3 * cells
        low, high = tl.load(ranges + 2 * k), tl.load(ranges + 2 * k + 1)
        now, after = flows + k % 3 * num_rows, flows + (k + 1) % 3 * num_rows
        after_next = flows + (k + 2) % 3 * num_rows
        for top in range(low, high, block):
            i = top + lanes
            inside = i < high
            below = inside & (i + 1 >= low_1) & (i + 1 < high_1)
            beside = inside & (i >= low_1) & (i < high_1)
            across = inside & (i + 1 >= low_2) & (i + 1 < high_2)
            place = weights + start_1 + (i - first_1)
            share = tl.load(place + 1, mask=below, other=0.0).to(tl.float64)
            flow = tl.load(after + i + 1, mask=below, other=0.0) * share
            share = tl.load(place + cells_1, mask=beside, other=0.0).to(tl.float64)
            flow += tl.load(after + i, mask=beside, other=0.0) * share
            place = weights + start_2 + (i - first_2) + 1 + 2 * cells_2
            share = tl.load(place, mask=across, other=0.0).to(tl.float64)
            flow += tl.load(after_next + i + 1, mask=across, other=0.0) * share
            flow = tl.where((step == 0) & (i == n - 1), source, flow)
            tl.store(now + i, flow, mask=inside)
            tl.store(grad + i.to(tl.int64) * num_columns + (k - i), flow.to(grad.dtype.element_ty), mask=inside)
        start_2, first_2, cells_2, low_2, high_2 = start_1, first_1, cells_1, low_1, high_1
        start_1, first_1, cells_1, low_1, high_1 = start_0, first, cells, low, high
        tl.debug_barrier()  # the next diagonal reads what other threads have stored


def solve(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
    keep: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """Compute the values and, if `keep`, their gradients (else an empty tensor); an invalid length gives NaN."""
    batch, n, m = cost.shape
    value = torch.empty(batch, dtype=torch.float64, device=cost.device)
    rows = torch.empty(batch, 3, n, dtype=torch.float64, device=cost.device)
    weights = cost.new_empty(batch if keep else 0, 3, n * m)
    ranges = torch.empty(batch if keep else 0, n + m - 1, 2, dtype=torch.int32, device=cost.device)
    inverse_high = float(torch.tensor(1 / gamma, dtype=torch.float32))  # Triton takes float arguments as float32
    block = min(_LARGEST_BLOCK, max(16, triton.next_power_of_2(min(n, m))))
    options = {"block": block, "num_warps": max(1, min(8, block // 32))}
    _forward[(batch,)](
        cost.detach(), x_lengths, y_lengths, value, rows, weights, ranges, inverse_high, 1 / gamma - inverse_high, n, m,
        *cost.stride(), keep=keep, narrow=min(n, m) > block, **options,
    )  # fmt: skip
    grad = cost.new_zeros(cost.shape if keep else (0,))
    if keep:
        _backward[(batch,)](grad, x_lengths, y_lengths, value, rows, weights, ranges, n, m, **options)
    return (value * gamma).to(cost.dtype), grad
