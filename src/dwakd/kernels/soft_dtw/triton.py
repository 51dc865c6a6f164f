"""Compute Soft-DTW on GPUs with Triton: one program per example computes its anti-diagonals, in blocks of rows.

The weights of a cell are the probabilities of its three predecessors on a path. The flow of a cell is its gradient: the
probability that a path passes through it. Accumulated costs, divided by gamma, and flows are in float64. Exponentials
and weights have the dtype of the costs. Cells at both ends of a diagonal that no path of finite cost reaches are
skipped, so a hard band (+inf outside) takes time for the cells inside only. Row i of the costs holds the columns from
starts[i] on. The cells outside this band have infinite costs. The three weights of each cell are stored diagonal by
diagonal, and freed once the gradient is computed. `no_type_check` prevents the tests' shape checker from
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
    cost, starts, x_lengths, y_lengths, value, used, reached, weights, ranges, inverse_high, inverse_low, num_rows,
    num_columns, width, num_weights, stride_example, stride_row, stride_column,
    keep: tl.constexpr, narrow: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0).to(tl.int64)
    n, m = _lengths(x_lengths + example, y_lengths + example, num_rows, num_columns)
    cost += example * stride_example
    starts += example * num_rows
    reached += example * 3 * num_rows
    weights += example * num_weights
    ranges += example * 4 * (num_rows + num_columns - 1)
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
            at = k - i - tl.load(starts + i, mask=inside, other=0)
            cell = cost + i.to(tl.int64) * stride_row + at * stride_column
            here = tl.load(cell, mask=inside & (at >= 0) & (at < width), other=float("inf")).to(tl.float64)
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
                place = weights + start + (i - from_row)
                share = 1.0 / tl.maximum(total, 1.0)
                tl.store(place, a * share, mask=inside)
                tl.store(place + (to_row - from_row), b * share, mask=inside)
                tl.store(place + 2 * (to_row - from_row), c * share, mask=inside)
        if narrow == 0:
            low, high = from_row, to_row
        cells = tl.maximum(to_row - from_row, 0)
        if keep:
            tl.store(ranges + 4 * k, low)
            tl.store(ranges + 4 * k + 1, high)
            tl.store(ranges + 4 * k + 2, from_row)
            tl.store(ranges + 4 * k + 3, cells)
        low_2, high_2, low_1, high_1 = low_1, high_1, low, high
        start += 3 * cells
        tl.debug_barrier()  # the next diagonal reads what other threads have stored
    is_wrong = (tl.sum(bad, axis=0) > 0) | (n == 0)
    tl.store(value + example, tl.where(is_wrong, float("nan"), tl.min(end_value, axis=0)))
    if keep:
        tl.store(used + example, start)


@triton.jit
@no_type_check
def _backward(
    grad, starts, x_lengths, y_lengths, value, used, flows, weights, ranges, num_rows, num_columns, width, num_weights,
    block: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0).to(tl.int64)
    n, m = _lengths(x_lengths + example, y_lengths + example, num_rows, num_columns)
    grad += example * num_rows * width
    starts += example * num_rows
    flows += example * 3 * num_rows
    weights += example * num_weights
    ranges += example * 4 * (num_rows + num_columns - 1)
    lanes = tl.arange(0, block)
    # the last cell has flow 1, or 0 if it cannot be reached
    value_here = tl.load(value + example)
    source = tl.where(value_here < float("inf"), 1.0, tl.where(value_here == float("inf"), 0.0, value_here))
    start_0 = tl.load(used + example)  # end of the weights of this diagonal, then their start
    zero = tl.zeros([], tl.int32)
    start_1, first_1, cells_1, low_1, high_1 = start_0, zero, zero, zero, zero  # the next diagonal
    start_2, first_2, cells_2, low_2, high_2 = start_0, zero, zero, zero, zero  # the diagonal after the next one
    for step in range(n + m - 1):
        k = n + m - 2 - step
        low, high = tl.load(ranges + 4 * k), tl.load(ranges + 4 * k + 1)
        first, cells = tl.load(ranges + 4 * k + 2), tl.load(ranges + 4 * k + 3)
        start_0 -= 3 * cells
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
            at = k - i - tl.load(starts + i, mask=inside, other=0)
            cell = grad + i.to(tl.int64) * width + at
            tl.store(cell, flow.to(grad.dtype.element_ty), mask=inside & (at >= 0) & (at < width))
        start_2, first_2, cells_2, low_2, high_2 = start_1, first_1, cells_1, low_1, high_1
        start_1, first_1, cells_1, low_1, high_1 = start_0, first, cells, low, high
        tl.debug_barrier()  # the next diagonal reads what other threads have stored


def solve(
    cost: Float[Tensor, "batch n width"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
    keep: bool,
    starts: Int[Tensor, "batch n"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """Compute the values and, if `keep`, their gradients (else an empty tensor); an invalid length gives NaN."""
    batch, n, width = cost.shape
    m, is_band = width, starts is not None
    if starts is None:
        starts = torch.zeros(batch, n, dtype=torch.int32, device=cost.device)
    else:
        m = int(starts.max()) + width
    x_lengths, y_lengths, starts = x_lengths.contiguous(), y_lengths.contiguous(), starts.contiguous()
    value = torch.empty(batch, dtype=torch.float64, device=cost.device)
    used = torch.empty(batch, dtype=torch.int64, device=cost.device)
    rows = torch.empty(batch, 3, n, dtype=torch.float64, device=cost.device)
    # up to two more rows than those in the band are computed on each diagonal
    num_weights = 3 * (n * width + (2 * (n + m) if is_band else 0))
    weights = cost.new_empty(batch if keep else 0, num_weights)
    ranges = torch.empty(batch if keep else 0, n + m - 1, 4, dtype=torch.int32, device=cost.device)
    inverse_high = float(torch.tensor(1 / gamma, dtype=torch.float32))  # Triton takes float arguments as float32
    block = min(_LARGEST_BLOCK, max(16, triton.next_power_of_2(min(n, width))))
    options = {"block": block, "num_warps": max(1, min(8, block // 32))}
    grad = cost.new_zeros(cost.shape if keep else (0,))
    with torch.cuda.device_of(cost):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current device
        _forward[(batch,)](
            cost.detach(), starts, x_lengths, y_lengths, value, used, rows, weights, ranges, inverse_high,
            1 / gamma - inverse_high, n, m, width, num_weights, *cost.stride(), keep=keep,
            narrow=is_band or min(n, m) > block, **options,
        )  # fmt: skip
        if keep:
            _backward[(batch,)](
                grad, starts, x_lengths, y_lengths, value, used, rows, weights, ranges, n, m, width, num_weights,
                **options,
            )  # fmt: skip
    return (value * gamma).to(cost.dtype), grad
