"""The compiled loops of the CPU kernel: numpy arrays in, numpy arrays out, no torch.

The arrays of one diagonal hold cell i at index i + 1; index 0 is the row before the first. Weights lie in
blocks, one per diagonal: three planes (of the predecessor above, left, above left) of the diagonal's cells padded
to a multiple of LANES. Padding cells are unreachable and pass nothing on.

In float32, LANES cells are computed at once. numba's own vectoriser gives up on these loops (many arrays that might
overlap, two widths of float), so the vectors are spelled out in LLVM's terms, which fits them to the processor.
Carried costs and flows are float64, exponentials, logarithms and weights float32.

All of it is one file because numba's cache on disk notices changes of the file it compiles from, and of no other.
`no_type_check` keeps the tests' shape checker from wrapping what numba compiles.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

logger = logging.getLogger(__name__)

LANES = 8
_F32, _F64, _I32 = (ir.VectorType(scalar, LANES) for scalar in (ir.FloatType(), ir.DoubleType(), ir.IntType(32)))

# exp(r) for |r| <= ln 2 / 2 after Cephes' expf, highest power first, without the two leading terms 1 + r
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# 2 artanh(z) / z in z^2 for 0 <= z <= 1 / 2: Chebyshev fit, 2e-8 relative
_ARTANH = (0.3675323923349, 0.1620839772365, 0.2940806106697, 0.3994882271805, 0.6666779575976, 2.0)


class _Vectors:
    """LANES numbers at a time, over LLVM's IR builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def load(self, address: Any, kind: Any, skip_bytes: int = 0) -> Any:
        address = self.b.add(address, ir.Constant(address.type, skip_bytes))
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def constant(self, number: float, kind: Any) -> Any:
        return ir.Constant(kind, [number] * LANES)

    def spread(self, scalar: Any) -> Any:
        empty = ir.Constant(_F64, ir.Undefined)
        first = self.b.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        return self.b.shuffle_vector(first, empty, ir.Constant(_I32, [0] * LANES))

    def lower(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def higher(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c, fused where the processor can."""
        kind = ir.FunctionType(_F32, [_F32] * 3)
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return self.b.call(function, [a, b, c])

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        total = self.constant(coefficients[0], _F32)
        for coefficient in coefficients[1:]:
            total = self.multiply_add(total, x, self.constant(coefficient, _F32))
        return total

    def exp(self, x: Any) -> Any:
        """exp(x) = 2^k exp(r) for x <= 0: within 1e-7 relative, exactly 1 at 0, and 0 below -87."""
        floor = self.constant(-87.0, _F32)
        y = self.higher(x, floor)
        # adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
        rounder = self.constant(1.5 * 2**23, _F32)
        shifted = self.multiply_add(y, self.constant(1.4426950408889634, _F32), rounder)
        k = self.b.fsub(shifted, rounder)
        r = self.multiply_add(k, self.constant(-0.693359375, _F32), y)
        r = self.multiply_add(k, self.constant(2.12194440e-4, _F32), r)
        p = self.multiply_add(self.polynomial(r, _EXP), self.b.fmul(r, r), r)
        p = self.b.fadd(p, self.constant(1.0, _F32))
        exponent = self.b.shl(self.b.bitcast(shifted, _I32), self.constant(23, _I32))
        scaled = self.b.bitcast(self.b.add(self.b.bitcast(p, _I32), exponent), _F32)
        return self.b.select(self.b.fcmp_ordered("<", x, floor), self.constant(0.0, _F32), scaled)

    def log1p(self, u: Any) -> Any:
        """log(1 + u) = 2 artanh(u / (2 + u)) for 0 <= u <= 2: within 2e-7 relative, exactly 0 at 0."""
        z = self.b.fdiv(u, self.b.fadd(u, self.constant(2.0, _F32)))
        return self.b.fmul(self.polynomial(self.b.fmul(z, z), _ARTANH), z)


@intrinsic
@no_type_check
def forward_lanes(typingctx, last, before, cost, now, weights, plane, gamma, inverse_gamma):
    """Costs reached and softmin weights of LANES cells.

    `last` and `before` are the addresses of the cells above in the two diagonals before (float64), `cost`
    (float32) and `now` (float64) of the cells themselves, `weights` of their first weight (float32);
    `plane` is the distance in bytes between a cell's three weights.
    """
    signature = types.void(*[types.uintp] * 6, types.float64, types.float64)

    def codegen(context, builder, signature, args):
        last, before, cost, now, weights, plane, gamma, inverse_gamma = args
        v = _Vectors(builder)
        reached = [v.load(last, _F64), v.load(last, _F64, 8), v.load(before, _F64)]
        lowest = v.lower(reached[2], v.lower(reached[1], reached[0]))
        finite = v.lower(lowest, v.constant(1e300, _F64))  # all three unreachable: exponents are -inf, not NaN
        scale = v.spread(inverse_gamma)
        exponents = (builder.fmul(builder.fsub(finite, source), scale) for source in reached)
        a, b, c = (v.exp(builder.fptrunc(exponent, _F32)) for exponent in exponents)
        # the largest of the three is exactly 1; `rest` is the sum of the other two
        rest = builder.fadd(v.lower(a, b), v.lower(v.higher(a, b), c))
        log_total = builder.fpext(v.log1p(rest), _F64)
        share = builder.fdiv(v.constant(1.0, _F32), builder.fadd(v.constant(1.0, _F32), rest))
        for weight in (a, b, c):
            v.store(builder.fmul(weight, share), weights)
            weights = builder.add(weights, plane)
        soft = builder.fsub(lowest, builder.fmul(v.spread(gamma), log_total))
        v.store(builder.fadd(builder.fpext(v.load(cost, _F32), _F64), soft), now)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
@no_type_check
def backward_lanes(typingctx, ups, lefts, corners, weights, plane, flow):
    """The flow through LANES cells, and what each passes on to its three predecessors.

    `ups`, `lefts`, `corners` are the addresses of the cells in the three float64 arrays of flows passed on, which
    are read for the diagonals after and overwritten for this one; `flow` is where the sum goes (float64).
    """
    signature = types.void(*[types.uintp] * 6)

    def codegen(context, builder, signature, args):
        ups, lefts, corners, weights, plane, flow = args
        v = _Vectors(builder)
        arriving = builder.fadd(v.load(ups, _F64, 8), v.load(lefts, _F64))
        arriving = builder.fadd(arriving, v.load(corners, _F64, 8))
        v.store(arriving, flow)
        for passed_on in (ups, lefts, corners):
            v.store(builder.fmul(arriving, builder.fpext(v.load(weights, _F32), _F64)), passed_on)
            weights = builder.add(weights, plane)
        return context.get_dummy_value()

    return signature, codegen


# --- one diagonal: vectors in float32, a plain loop with libm's functions in float64 ---


@no_type_check
def _forward_diagonal(gamma, cost, before, last, now, weights, start, first, padded):
    """Costs reached on the diagonal whose first cell is in row `first`, and their weights."""


@overload(_forward_diagonal)
@no_type_check
def _forward_diagonal_of(gamma, cost, before, last, now, weights, start, first, padded):
    def float32(gamma, cost, before, last, now, weights, start, first, padded):
        inverse = 1.0 / gamma
        for t in range(0, padded, LANES):
            above, here = np.uintp(8 * (first + t)), np.uintp(8 * (first + 1 + t))
            forward_lanes(
                last.ctypes.data + above,
                before.ctypes.data + above,
                cost.ctypes.data + np.uintp(4 * t),
                now.ctypes.data + here,
                weights.ctypes.data + np.uintp(4 * (start + t)),
                np.uintp(4 * padded),
                gamma,
                inverse,
            )

    def float64(gamma, cost, before, last, now, weights, start, first, padded):
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


@no_type_check
def _backward_diagonal(ups, lefts, corners, weights, start, first, padded, flow):
    """Flow through the diagonal's cells, and what they pass on."""


@overload(_backward_diagonal)
@no_type_check
def _backward_diagonal_of(ups, lefts, corners, weights, start, first, padded, flow):
    def float32(ups, lefts, corners, weights, start, first, padded, flow):
        for t in range(0, padded, LANES):
            here = np.uintp(8 * (first + 1 + t))
            up, left, corner = ups.ctypes.data + here, lefts.ctypes.data + here, corners.ctypes.data + here
            weight, out = weights.ctypes.data + np.uintp(4 * (start + t)), flow.ctypes.data + np.uintp(8 * t)
            backward_lanes(up, left, corner, weight, np.uintp(4 * padded), out)

    def float64(ups, lefts, corners, weights, start, first, padded, flow):
        for t in range(padded):
            i = first + 1 + t
            arriving = ups[i + 1] + lefts[i] + corners[i + 1]
            flow[t] = arriving
            ups[i] = arriving * weights[start + t]
            lefts[i] = arriving * weights[start + padded + t]
            corners[i] = arriving * weights[start + 2 * padded + t]

    return float32 if weights.dtype is types.float32 else float64


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit with an on-disk cache where a folder for it is writable, and without one elsewhere."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba: "no locator available"
        logger.info("Soft-DTW is compiled anew in each process: %s.", error)
        compiled = numba.njit(**options)(function)
    return compiled


@_compiled
@no_type_check
def forward_batch(gamma, cost, lengths, keep, weights, starts, value, first_row, last_row):
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
def backward_batch(grad_value, value, lengths, weights, starts, grad_cost, first_row, last_row):
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
        # rows before `first` are never written while k falls: they pass nothing on
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
            corners, other_corners = other_corners, corners
