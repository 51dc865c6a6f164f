"""Eight cells of an anti-diagonal at once in float32: vector code that the loops of `cpu_loops` call by address.

numba's own vectoriser gives up on these loops (many arrays that might overlap, two widths of float), so the vectors
are spelled out in LLVM's terms; LLVM turns them into whatever the processor has. Carried costs and flows are float64,
exponentials, logarithms and weights float32.
"""

from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8

_F32, _F64, _I32 = (ir.VectorType(scalar, LANES) for scalar in (ir.FloatType(), ir.DoubleType(), ir.IntType(32)))

# exp(r) for |r| <= ln 2 / 2 after Cephes' expf, highest power first, without the two leading terms 1 + r
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# 2 artanh(z) / z in z^2 for 0 <= z <= 1 / 2: Chebyshev fit, 2e-8 relative
_ARTANH = (0.3675323923349, 0.1620839772365, 0.2940806106697, 0.3994882271805, 0.6666779575976, 2.0)


class _Vectors:
    """A thin layer over the IR builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def load(self, address: Any, kind: Any) -> Any:
        pointer = self.b.inttoptr(address, kind.as_pointer())
        return self.b.load(pointer, align=4 if kind is _F32 else 8)

    def store(self, value: Any, address: Any) -> None:
        pointer = self.b.inttoptr(address, value.type.as_pointer())
        self.b.store(value, pointer, align=4 if value.type is _F32 else 8)

    def shifted(self, address: Any, num_bytes: int) -> Any:
        return self.b.add(address, ir.Constant(address.type, num_bytes))

    def constant(self, number: float, kind: Any) -> Any:
        return ir.Constant(kind, [number] * LANES)

    def spread(self, scalar: Any) -> Any:
        one = self.b.insert_element(ir.Constant(_F64, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(_I32, [0] * LANES)
        return self.b.shuffle_vector(one, ir.Constant(_F64, ir.Undefined), zeros)

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
def forward_lanes(typingctx, last, before, cost, now, weights, plane, gamma, inverse_gamma):  # type: ignore[no-untyped-def]
    """Costs reached and softmin weights of LANES cells.

    `last` and `before` are the addresses of the cells above in the two diagonals before (float64), `cost`
    (float32) and `now` (float64) of the cells themselves, `weights` of their first weight (float32);
    `plane` is the distance in bytes between a cell's three weights.
    """
    signature = types.void(*[types.uintp] * 6, types.float64, types.float64)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        last, before, cost, now, weights, plane, gamma, inverse_gamma = args
        v = _Vectors(builder)
        reached = [v.load(last, _F64), v.load(v.shifted(last, 8), _F64), v.load(before, _F64)]
        lowest = v.lower(reached[2], v.lower(reached[1], reached[0]))
        finite = v.lower(lowest, v.constant(1e300, _F64))  # all three unreachable: exponents are -inf, not NaN
        scale = v.spread(inverse_gamma)
        a, b, c = (
            v.exp(builder.fptrunc(builder.fmul(builder.fsub(finite, from_), scale), _F32)) for from_ in reached
        )
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
def backward_lanes(typingctx, ups, lefts, corners, weights, plane, flow):  # type: ignore[no-untyped-def]
    """The flow through LANES cells, and what each passes on to its three predecessors.

    `ups`, `lefts`, `corners` are the addresses of the cells in the three float64 arrays of flows passed on, which are
    read for the diagonals after and overwritten for this one; `flow` is where the sum goes (float64).
    """
    signature = types.void(*[types.uintp] * 6)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ups, lefts, corners, weights, plane, flow = args
        v = _Vectors(builder)
        arriving = builder.fadd(v.load(v.shifted(ups, 8), _F64), v.load(lefts, _F64))
        arriving = builder.fadd(arriving, v.load(v.shifted(corners, 8), _F64))
        v.store(arriving, flow)
        for passed_on in (ups, lefts, corners):
            v.store(builder.fmul(arriving, builder.fpext(v.load(weights, _F32), _F64)), passed_on)
            weights = builder.add(weights, plane)
        return context.get_dummy_value()

    return signature, codegen
