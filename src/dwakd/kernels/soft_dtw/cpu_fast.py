"""Compute Soft-DTW for float32 costs of moderate size: the fast path of the CPU kernel, on numpy arrays.

The kernel computes one anti-diagonal after the other, LANES cells at once. It stores differences of the accumulated
cost R between neighbours, in units of gamma: the step down into a cell, R[i, j] - R[i - 1, j], by row, and the step
right, R[i, j] - R[i, j - 1], by column. R grows along a path, but these differences stay small enough for float32.
numba does not vectorise such loops (many arrays that may overlap, two widths of float), so the code uses LLVM's vector
instructions, which LLVM translates for the processor.

All functions are in one file, because numba's cache on disk detects changes of the compiled file only.
`no_type_check` prevents the tests' shape checker from wrapping the compiled functions.
"""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dwakd.kernels.compiled import compiled_by_numba

LANES = 8
_LIMIT = 4.0  # largest cost, in units of gamma; with larger ones, rounding errors in the gradient reach 1e-6
_LEAST_FLOW = 1e-30  # gradients of cells below this become 0
_FAR = np.float32(1e9)  # distance of the row and the column before the first, in units of gamma
_F32, _F64, _I32 = (ir.VectorType(scalar, LANES) for scalar in (ir.FloatType(), ir.DoubleType(), ir.IntType(32)))

# exp(r) for |r| <= ln 2 / 2 after Cephes' expf, highest power first, without the two leading terms 1 + r
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# 2 artanh(z) / z in z^2 for 0 <= z <= 1 / 2: a Chebyshev fit with a relative error of 2e-8
_ARTANH = (0.3675323923349, 0.1620839772365, 0.2940806106697, 0.3994882271805, 0.6666779575976, 2.0)


class _Vectors:
    """Vector operations on LANES numbers with LLVM's IR builder."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.b = builder
        self.arrays = {
            value: context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args, args, strict=True)
            if isinstance(kind, types.Array)
        }

    def address(self, array: Any, index: Any, skip: int = 0) -> Any:
        return self.b.gep(self.arrays[array], [self.b.add(index, ir.Constant(index.type, skip))])

    def load(self, array: Any, index: Any, kind: Any, skip: int = 0) -> Any:
        address = self.b.bitcast(self.address(array, index, skip), kind.as_pointer())
        return self.b.load(address, align=4)

    def store(self, value: Any, array: Any, index: Any) -> None:
        self.b.store(value, self.b.bitcast(self.address(array, index), value.type.as_pointer()), align=4)

    def apart(self, array: Any, index: Any, stride: Any) -> list[Any]:
        """Return the addresses of LANES elements at distance `stride`."""
        first = self.address(array, index)
        # otherwise LLVM stores a pointer for each lane on the stack between blocks
        hide = ir.InlineAsm(ir.FunctionType(first.type, [first.type]), "", "=r,0")
        first = self.b.call(hide, [first])
        return [self.b.gep(first, [self.b.mul(stride, ir.Constant(stride.type, lane))]) for lane in range(LANES)]

    def load_apart(self, array: Any, index: Any, stride: Any) -> Any:
        value = ir.Constant(_F32, ir.Undefined)
        for lane, address in enumerate(self.apart(array, index, stride)):
            value = self.b.insert_element(value, self.b.load(address), ir.Constant(ir.IntType(32), lane))
        return value

    def store_apart(self, value: Any, array: Any, index: Any, stride: Any) -> None:
        for lane, address in enumerate(self.apart(array, index, stride)):
            self.b.store(self.b.extract_element(value, ir.Constant(ir.IntType(32), lane)), address)

    def constant(self, number: float, kind: Any) -> Any:
        return ir.Constant(kind, [number] * LANES)

    def spread(self, scalar: Any) -> Any:
        empty = ir.Constant(_F32, ir.Undefined)
        first = self.b.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        return self.b.shuffle_vector(first, empty, ir.Constant(_I32, [0] * LANES))

    def lower(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def higher(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Compute a b + c, with a fused instruction if the processor has one."""
        kind = ir.FunctionType(_F32, [_F32] * 3)
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return self.b.call(function, [a, b, c])

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        total = self.constant(coefficients[0], _F32)
        for coefficient in coefficients[1:]:
            total = self.multiply_add(total, x, self.constant(coefficient, _F32))
        return total

    def exp(self, x: Any) -> Any:
        """Compute exp(x) = 2^k exp(r) for x <= 0, within 1e-7 (relative); 1 at 0, 0 from -87 down and for NaN."""
        floor = self.constant(-87.0, _F32)
        y = self.higher(x, floor)
        # adding 1.5 * 2^23 rounds to an integer and stores it in the low bits
        rounder = self.constant(1.5 * 2**23, _F32)
        shifted = self.multiply_add(y, self.constant(1.4426950408889634, _F32), rounder)
        k = self.b.fsub(shifted, rounder)
        r = self.multiply_add(k, self.constant(-0.693359375, _F32), y)
        r = self.multiply_add(k, self.constant(2.12194440e-4, _F32), r)
        p = self.multiply_add(self.polynomial(r, _EXP), self.b.fmul(r, r), r)
        p = self.b.fadd(p, self.constant(1.0, _F32))
        exponent = self.b.shl(self.b.bitcast(shifted, _I32), self.constant(23, _I32))
        scaled = self.b.bitcast(self.b.add(self.b.bitcast(p, _I32), exponent), _F32)
        return self.b.select(self.b.fcmp_ordered(">", y, floor), scaled, self.constant(0.0, _F32))

    def log1p(self, u: Any) -> Any:
        """Compute log(1 + u) = 2 artanh(u / (2 + u)) for 0 <= u <= 2 with a relative error of 2e-7; exactly 0 at 0."""
        z = self.b.fdiv(u, self.b.fadd(u, self.constant(2.0, _F32)))
        return self.b.fmul(self.polynomial(self.b.fmul(z, z), _ARTANH), z)


@intrinsic
@no_type_check
def _forward_lanes(typingctx, downs, i, rights, j, cells, at, stride, inverse, weights, start, plane):
    """Compute LANES cells of a diagonal, from row i down.

    `downs[i ...]` contains the steps down into the cells on the left, `rights[j ...]` the steps right into the cells
    above; both are overwritten by the steps into the cells themselves. Costs are `cells[at], cells[at + stride], ...`;
    `inverse` is 1 / gamma. The weights of the predecessors above and left are written to `weights[start ...]` and
    `weights[start + plane ...]`; the third weight is 1 minus these two.
    """
    index = types.intp
    signature = types.void(downs, index, rights, index, cells, index, index, types.float32, weights, index, index)

    def codegen(context, builder, signature, args):
        downs, i, rights, j, cells, at, stride, inverse, weights, start, plane = args
        v = _Vectors(context, builder, signature, args)
        # costs above and left, minus the cost at the corner; then the lowest of the three minus each
        up, left, zero = v.load(rights, j, _F32), v.load(downs, i, _F32), v.constant(0.0, _F32)
        lowest = v.lower(v.lower(up, left), zero)
        above_up, above_left = builder.fsub(lowest, up), builder.fsub(lowest, left)
        a, b, c = v.exp(above_up), v.exp(above_left), v.exp(lowest)
        # the largest of the three is exactly 1; `rest` is the sum of the other two
        rest = builder.fadd(v.lower(a, b), v.lower(v.higher(a, b), c))
        share = builder.fdiv(v.constant(1.0, _F32), builder.fadd(v.constant(1.0, _F32), rest))
        v.store(builder.fmul(a, share), weights, start)
        v.store(builder.fmul(b, share), weights, builder.add(start, plane))
        cost = builder.fmul(v.load_apart(cells, at, stride), v.spread(inverse))
        step = builder.fsub(cost, v.log1p(rest))  # step from the lowest predecessor
        v.store(builder.fadd(step, above_up), downs, i)
        v.store(builder.fadd(step, above_left), rights, j)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
@no_type_check
def _backward_lanes(typingctx, flows, ups, lefts, corners, weights, start, plane, cells, at, stride):
    """Compute the flow (gradient) of LANES cells and the parts of it that their three predecessors receive.

    The flow of the cells is written to `cells[at], cells[at + stride], ...`. `ups`, `lefts` and `corners` are positions
    in `flows`, which holds the flow from each cell to its predecessors. The flow of the later diagonals is read and
    replaced by that of this one. It is in float64, and the corner gets the remainder, so almost no flow is lost.
    """
    signature = types.void(flows, *[types.intp] * 3, weights, *[types.intp] * 2, cells, *[types.intp] * 2)

    def codegen(context, builder, signature, args):
        flows, ups, lefts, corners, weights, start, plane, cells, at, stride = args
        v = _Vectors(context, builder, signature, args)
        arriving = builder.fadd(v.load(flows, ups, _F64, 1), v.load(flows, lefts, _F64))
        arriving = builder.fadd(arriving, v.load(flows, corners, _F64, 1))
        # denormal gradients make later matrix products up to a hundred times slower
        seen = builder.fcmp_ordered(">", arriving, v.constant(_LEAST_FLOW, _F64))
        arriving = left_over = builder.select(seen, arriving, v.constant(0.0, _F64))
        for passed_on in (ups, lefts):
            flow = builder.fmul(arriving, builder.fpext(v.load(weights, start, _F32), _F64))
            v.store(flow, flows, passed_on)
            left_over = builder.fsub(left_over, flow)
            start = builder.add(start, plane)
        v.store(left_over, flows, corners)
        v.store_apart(builder.fptrunc(arriving, _F32), cells, at, stride)
        return context.get_dummy_value()

    return signature, codegen


@compiled_by_numba
@no_type_check
def _forward_fast(cells, n, m, width, inverse, keep, weights):
    """Return the cost at the end, in units of gamma, and the end of the weights, stored for all cells if `keep`."""
    # rows in order and columns in reverse, so that a diagonal runs forward through both
    downs, rights = np.zeros(n + LANES, np.float32), np.zeros(m + LANES, np.float32)
    rights[m - 1] = _FAR
    tail = np.zeros(LANES, np.float32)
    stride = width - 1
    start, total = 0, 0.0
    for i in range(n):
        total += cells[i * width] * inverse
    inverse = np.float32(inverse)
    for k in range(n + m - 1):
        first, end = max(0, k - m + 1), min(n, k + 1)
        plane = (end - first + LANES - 1) // LANES * LANES
        whole = (end - first) // LANES * LANES
        at, column = first * width + k - first, m - 1 - k
        if k < n:
            downs[k] = 0.0 if k > 0 else _FAR
        for t in range(0, whole, LANES):
            i = first + t
            _forward_lanes(
                downs, i, rights, column + i, cells, at + t * stride, stride, inverse, weights, start + t, plane
            )
        if whole < plane:
            for t in range(end - first - whole):
                tail[t] = cells[at + (whole + t) * stride]
            i = first + whole
            _forward_lanes(downs, i, rights, column + i, tail, 0, 1, inverse, weights, start + whole, plane)
        if k >= n:
            total += rights[column + n - 1]
        if keep:
            start += 2 * plane
    return total, start


@compiled_by_numba
@no_type_check
def _backward_fast(cells, n, m, width, weights, start):
    """Write the gradients to `cells`: the probability that a path, drawn by the weights, passes through each.

    `start` is the end of the weights.
    """
    size = n + 2 + LANES
    # the arrays of a diagonal hold cell i at i + 1; rows before `first` are not written as k decreases, so they are 0
    flows = np.zeros(4 * size)
    ups, lefts, corners, other_corners = 0, size, 2 * size, 3 * size  # corners of even and odd diagonals
    flows[corners + n + 1] = 1.0  # every path ends in the last cell
    tail = np.empty(LANES, np.float32)
    stride = width - 1
    for k in range(n + m - 2, -1, -1):
        first, end = max(0, k - m + 1), min(n, k + 1)
        plane = (end - first + LANES - 1) // LANES * LANES
        whole = (end - first) // LANES * LANES
        at = first * width + k - first
        start -= 2 * plane
        for t in range(0, whole, LANES):
            i = first + 1 + t
            _backward_lanes(
                flows, ups + i, lefts + i, corners + i, weights, start + t, plane, cells, at + t * stride, stride
            )
        if whole < plane:
            i = first + 1 + whole
            _backward_lanes(flows, ups + i, lefts + i, corners + i, weights, start + whole, plane, tail, 0, 1)
            for t in range(end - first - whole):
                cells[at + (whole + t) * stride] = tail[t]
        corners, other_corners = other_corners, corners


@compiled_by_numba
@no_type_check
def _are_within(cost, row, n, m, limit):
    """Return whether the absolute value of all costs of the example is at most `limit`; False if one is NaN."""
    for i in range(n):
        num_within = 0
        for j in range(m):  # LLVM vectorises a count, but not a maximum
            num_within += abs(cost[row, i, j]) <= limit
        if num_within < m:
            return False
    return True


@compiled_by_numba
@no_type_check
def solve_fast(cost, x_lengths, y_lengths, gamma, keep, value, grad, is_open, first_row, last_row):
    """Compute examples first_row to last_row - 1, with gradients if `keep` is true.

    Examples with large costs are marked as open and not computed.

    Returns:
        The number of open examples.
    """
    width, size, num_open = cost.shape[2], 0, 0
    limit = np.float32(min(_LIMIT * gamma, 1e38))
    for row in range(first_row, last_row):
        n, m = x_lengths[row], y_lengths[row]
        size = max(size, 2 * (min(n, m) + LANES) * (n + m - 1 if keep else 1))
    weights = np.empty(size, np.float32)
    for row in range(first_row, last_row):
        n, m = x_lengths[row], y_lengths[row]
        is_open[row] = not _are_within(cost, row, n, m, limit)
        if is_open[row]:
            num_open += 1
            continue
        reached, used = _forward_fast(cost[row].reshape(-1), n, m, width, 1.0 / gamma, keep, weights)
        value[row] = reached * gamma
        if keep:
            grad[row, n:] = 0.0
            grad[row, :n, m:] = 0.0
            _backward_fast(grad[row].reshape(-1), n, m, width, weights, used)
    return num_open
