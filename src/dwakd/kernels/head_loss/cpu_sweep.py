"""Compiled passes over the logits for `SoftenedPair`. They read numpy arrays and overwrite them, without torch.

The computation for a few tokens (columns) of one vocabulary entry (row) is written with LLVM's vector instructions,
because numba does not vectorise loops over so many arrays that may overlap. Sums are accumulated in float32 over ROWS
rows, then in float64.

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

ROWS = 64
SUMS = 7
_FLOOR = -125.5  # log2 of the smallest stored power; smaller ones become 0
# (2^r - 1) / r for |r| <= 1/2, highest power first: a Chebyshev fit with an error of 2^r below 6e-9
_EXP2 = (0.0001545316294, 0.001339086336, 0.009618082557, 0.05550357114, 0.2402265076, 0.693147188)


class _Lanes:
    """Vector operations on a few neighbouring tokens (columns) with LLVM's IR builder."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.b, self.lanes = builder, signature.args[0].literal_value
        self.kind, self.bits = (ir.VectorType(scalar, self.lanes) for scalar in (ir.FloatType(), ir.IntType(32)))
        self.arrays = {
            value: context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args, args, strict=True)
            if isinstance(kind, types.Array)
        }

    def place(self, array: Any, index: Any) -> Any:
        return self.b.bitcast(self.b.gep(self.arrays[array], [index]), self.kind.as_pointer())

    def load(self, array: Any, index: Any) -> Any:
        return self.b.load(self.place(array, index), align=4)

    def store(self, value: Any, array: Any, index: Any) -> None:
        self.b.store(value, self.place(array, index), align=4)

    def constant(self, number: float) -> Any:
        return ir.Constant(self.kind, [number] * self.lanes)

    def integer(self, number: int) -> Any:
        return ir.Constant(self.bits, [number] * self.lanes)

    def spread(self, scalar: Any) -> Any:
        empty = ir.Constant(self.kind, ir.Undefined)
        first = self.b.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        return self.b.shuffle_vector(first, empty, self.integer(0))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Compute a b + c, with a fused instruction if the processor has one."""
        kind = ir.FunctionType(self.kind, [self.kind] * 3)
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fmuladd.v{self.lanes}f32")
        return self.b.call(function, [a, b, c])

    def exp2(self, x: Any) -> tuple[Any, Any]:
        """Compute x and 2^x for x <= 0. The power is exactly 1 at 0.

        Below the floor, x becomes the floor and the power becomes 0. NaN remains NaN.
        """
        above = self.b.fcmp_unordered(">", x, self.constant(_FLOOR))
        x = self.b.select(above, x, self.constant(_FLOOR))
        # adding 1.5 * 2^23 rounds to an integer and stores it in the low bits
        rounder = self.constant(1.5 * 2**23)
        shifted = self.b.fadd(x, rounder)
        r = self.b.fsub(x, self.b.fsub(shifted, rounder))
        power = self.constant(_EXP2[0])
        for coefficient in (*_EXP2[1:], 1.0):
            power = self.multiply_add(power, r, self.constant(coefficient))
        exponent = self.b.shl(self.b.bitcast(shifted, self.bits), self.integer(23))
        scale = self.b.bitcast(self.b.add(exponent, self.integer(127 << 23)), self.kind)
        return x, self.b.select(above, self.b.fmul(power, scale), self.constant(0.0))


@intrinsic(prefer_literal=True)
@no_type_check
def _observe_lanes(typingctx, lanes, own, a, other, b, peaks, t, tokens, scale, squared, sums):
    """Overwrite `own[a ...]` and `other[b ...]` from token t on; add to `sums[t ...]`, each sum of `tokens` entries."""
    at, flag = types.intp, types.boolean
    signature = types.void(lanes, own, at, other, at, peaks, at, at, types.float32, flag, sums)

    def codegen(context, builder, signature, args):
        _, own, a, other, b, peaks, t, tokens, scale, squared, sums = args
        v = _Lanes(context, builder, signature, args)
        scale, place, found = v.spread(scale), t, []

        def add(value, factor):
            nonlocal place
            v.store(v.multiply_add(value, factor, v.load(sums, place)), sums, place)
            place = builder.add(place, tokens)

        one = v.constant(1.0)
        for array, index, peak in ((own, a, t), (other, b, builder.add(t, tokens))):
            full = builder.fmul(builder.fsub(v.load(array, index), v.load(peaks, peak)), scale)
            x, kept = v.exp2(full)
            v.store(kept, array, index)
            power = builder.select(squared, builder.fmul(kept, kept), kept)
            add(power, one)
            add(kept, one)
            add(power, x)
            found.append((full, kept))
        (own_x, _), (other_x, kept) = found
        zero = v.constant(0.0)
        gap = builder.fsub(other_x, own_x)
        add(kept, builder.select(builder.fcmp_ordered("==", kept, zero), zero, gap))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
@no_type_check
def _gradient_lanes(typingctx, lanes, own, a, other, b, shares, t, tokens, squared, both):
    """Compute own <- shares[0] own - shares[1] other from token t on.

    With `both`, own also gets + shares[2] own^base, and other <- shares[3] other^base.
    """
    at, flag = types.intp, types.boolean
    signature = types.void(lanes, own, at, other, at, shares, at, at, flag, flag)

    def codegen(context, builder, signature, args):
        _, own, a, other, b, shares, t, tokens, squared, both = args
        v = _Lanes(context, builder, signature, args)
        second = builder.add(t, tokens)
        mine, theirs = v.load(own, a), v.load(other, b)
        pulled = builder.fmul(mine, v.load(shares, t))
        pulled = builder.fsub(pulled, builder.fmul(theirs, v.load(shares, second)))
        with builder.if_else(both) as (then, otherwise):
            with then:
                third = builder.add(second, tokens)
                mine, theirs = (builder.select(squared, builder.fmul(kept, kept), kept) for kept in (mine, theirs))
                v.store(v.multiply_add(mine, v.load(shares, third), pulled), own, a)
                v.store(builder.fmul(theirs, v.load(shares, builder.add(third, tokens))), other, b)
            with otherwise:
                v.store(pulled, own, a)
        return context.get_dummy_value()

    return signature, codegen


@compiled_by_numba
@no_type_check
def sweep_observe(own, own_step, other, other_step, first, last, peaks, tokens, scale, squared, sums):
    """Process vocabulary entries first to last - 1; add total, soft_total, energy of both sides and cross to `sums`."""
    part = np.empty(SUMS * tokens, np.float32)
    for start in range(first, last, ROWS):
        part[:] = 0
        for row in range(start, min(start + ROWS, last)):
            a, b, t = row * own_step, row * other_step, 0
            while t + 16 <= tokens:
                _observe_lanes(16, own, a + t, other, b + t, peaks, t, tokens, scale, squared, part)
                t += 16
            if tokens & 8:
                _observe_lanes(8, own, a + t, other, b + t, peaks, t, tokens, scale, squared, part)
            for t in range(tokens & ~7, tokens):
                _observe_lanes(1, own, a + t, other, b + t, peaks, t, tokens, scale, squared, part)
        for index in range(SUMS * tokens):
            sums[index] += part[index]


@compiled_by_numba
@no_type_check
def sweep_gradient(own, own_step, other, other_step, first, last, shares, tokens, squared, both):
    """Overwrite vocabulary entries first to last - 1 with the gradient, as described in `_gradient_lanes`."""
    for row in range(first, last):
        a, b, t = row * own_step, row * other_step, 0
        while t + 16 <= tokens:
            _gradient_lanes(16, own, a + t, other, b + t, shares, t, tokens, squared, both)
            t += 16
        if tokens & 8:
            _gradient_lanes(8, own, a + t, other, b + t, shares, t, tokens, squared, both)
        for t in range(tokens & ~7, tokens):
            _gradient_lanes(1, own, a + t, other, b + t, shares, t, tokens, squared, both)


@compiled_by_numba
@no_type_check
def sweep_peak(columns, step, first, last, best, rows):
    """Update the largest logit of each column (`best`) and its row with vocabulary entries first to last - 1."""
    tokens = len(best)
    for row in range(first, last):
        line, number = columns[row * step : row * step + tokens], np.int32(row)
        for t in range(tokens):
            rows[t] = number if line[t] > best[t] else rows[t]  # without branches, so that LLVM vectorises it
            best[t] = max(line[t], best[t])
