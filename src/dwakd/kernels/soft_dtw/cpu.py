"""Soft-DTW on the CPU with numba, parallel over the batch.

Accumulated costs are carried in float64 and only two anti-diagonals of them exist at a time. What the backward pass
needs are the soft minimum's three weights per cell: the forward pass keeps them, in the order of the anti-diagonals
and in the costs' own dtype (12 bytes a cell in float32), so that the backward pass has no exponentials. The loops over
a diagonal are split so that each touches few arrays and one width of float: that is what lets the compiler vectorise.
"""

import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numba import types
from numba.extending import overload
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

_LANES = 8  # diagonals are stored in multiples of this many cells, so that no loop has a scalar tail
_CELLS_PER_THREAD = 50_000  # below this many cells a thread costs more than it brings


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit with an on-disk cache where a folder for it is writable, and without one elsewhere."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba: "no locator available"
        logger.info("The Soft-DTW kernel is compiled anew in each process: %s", error)
        compiled = numba.njit(**options)(function)
    return compiled


# --- exp(x) for x <= 0 and log(1 + u) for 0 <= u <= 2, by dtype -----------------------------------------------------


def _exp(x: Any) -> Any: ...
def _log1p(u: Any) -> Any: ...


@overload(_exp, inline="always")
def _exp_of(x: Any) -> Any:
    if x is types.float64:
        return lambda x: math.exp(x)
    log2_e, ln2_high, ln2_low = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
    rounder, floor, zero, one = np.float32(1.5 * 2**23), np.float32(-87.0), np.float32(0.0), np.float32(1.0)
    c2, c3, c4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
    c5, c6, c7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)

    def exp32(x: Any) -> Any:
        """2^k exp(r), |r| <= ln 2 / 2 (Cephes' expf): within 1e-7 relative, 0 below -87, exactly 1 at 0."""
        y = floor if x < floor else x
        k = (y * log2_e + rounder) - rounder
        r = y - k * ln2_high - k * ln2_low
        p = (((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2) * r * r + r + one
        scaled = p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
        return zero if x < floor else scaled

    return exp32


@overload(_log1p, inline="always")
def _log1p_of(u: Any) -> Any:
    if u is types.float64:
        return lambda u: math.log1p(u)
    two = np.float32(2.0)
    c0, c1, c2, c3 = (np.float32(c) for c in LOGC[:4])
    c4, c5, c6 = (np.float32(c) for c in LOGC[4:])

    def log1p32(u: Any) -> Any:
        """2 artanh(u / (2 + u)) by an even minimax polynomial: within 1e-7 relative on [0, 2], exactly 0 at 0."""
        z = u / (u + two)
        q = z * z
        return ((((((c6 * q + c5) * q + c4) * q + c3) * q + c2) * q + c1) * q + c0) * z

    return log1p32


# --- one anti-diagonal of the forward pass --------------------------------------------------------------------------


@_compiled
def _lowest(up: Any, left: Any, both: Any, lowest: Any) -> None:
    for t in range(len(lowest)):
        low = left[t] if left[t] < up[t] else up[t]
        lowest[t] = both[t] if both[t] < low else low


@_compiled
def _exponents(reached: Any, lowest: Any, inverse_gamma: float, exponents: Any) -> None:
    for t in range(len(exponents)):
        finite = lowest[t] if lowest[t] < 1e308 else 1e308  # all three unreachable: -inf and not NaN
        exponents[t] = (finite - reached[t]) * inverse_gamma


@_compiled
def _softmin_weights(a: Any, b: Any, c: Any, log_total: Any) -> None:
    """Exponents to weights, in place. The largest exponent is 0, so log_total is in [0, log 3]."""
    one = log_total.dtype.type(1.0)
    for t in range(len(log_total)):
        x, y, z = _exp(a[t]), _exp(b[t]), _exp(c[t])
        low, high = (x, y) if x < y else (y, x)
        middle = high if high < z else z
        rest = low + middle if low < middle else middle + low
        log_total[t] = _log1p(rest)
        scale = one / (one + rest)
        a[t], b[t], c[t] = x * scale, y * scale, z * scale


@_compiled
def _add(cost: Any, lowest: Any, log_total: Any, gamma: float, reached: Any) -> None:
    for t in range(len(reached)):
        reached[t] = cost[t] + (lowest[t] - gamma * log_total[t])


def soft_dtw_cpu(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Soft-DTW of a ragged batch of float32 or float64 costs; the guarantees are those of `dwakd.kernels.soft_dtw`."""
    lengths = torch.stack((x_lengths, y_lengths), dim=1).to("cpu", torch.int64)
    if torch.is_grad_enabled() and cost.requires_grad:
        value: Tensor = _SoftDtw.apply(cost, gamma, lengths)
        return value
    return _forward(cost, gamma, lengths, keep_weights=False)[0]


class _SoftDtw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, lengths: Tensor) -> Tensor:
        value, weights, offsets = _forward(cost, gamma, lengths, keep_weights=True)
        ctx.save_for_backward(value, weights, offsets, lengths)
        ctx.shape = cost.shape
        return value

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        value, weights, offsets, lengths = ctx.saved_tensors
        grad_cost = grad_value.new_zeros(ctx.shape)
        args = [t.numpy() for t in (grad_value.contiguous(), value, weights, offsets, lengths, grad_cost)]
        _over_batch(_backward_batch, lengths, args)
        return grad_cost, None, None


def _forward(
    cost: Tensor, gamma: float, lengths: Tensor, keep_weights: bool
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " weights"], Int[Tensor, "batch diagonals"]]:
    """The values, the weights of every cell, and where each diagonal's weights begin."""
    diagonals = torch.arange(sum(cost.shape[1:]) - 1)
    x_lengths, y_lengths = lengths[:, :1], lengths[:, 1:]
    cells = (torch.minimum(diagonals + 1, x_lengths + y_lengths - 1 - diagonals)).clamp(min=0)
    cells = torch.minimum(cells, lengths.amin(dim=1, keepdim=True))
    padded = 3 * _LANES * ((cells + _LANES - 1) // _LANES)
    if keep_weights:
        ends = padded.flatten().cumsum(0)
        offsets, size = (ends - padded.flatten()).view_as(padded), int(ends[-1])
    else:  # every diagonal of an example overwrites the one before
        each = int(padded.max())
        offsets, size = (torch.arange(len(cost)) * each)[:, None].expand_as(padded).contiguous(), len(cost) * each
    weights, value = cost.new_empty(size), cost.new_empty(len(cost))
    tensors = (cost.detach().contiguous(), lengths, offsets, weights, value)
    _over_batch(_forward_batch, lengths, [np.float64(gamma), *(t.numpy() for t in tensors)])
    return value, weights, offsets


def _over_batch(kernel: Callable[..., None], lengths: Tensor, args: list[Any]) -> None:
    """Call kernel(*args, first, last) on ranges of examples of about equal work, one thread each.

    Plain threads that release the GIL: numba's own pool would be a second OpenMP runtime beside torch's. They live
    as long as the call, so a forked process inherits none. Each example is computed by one thread in one order: the
    result does not depend on their number.
    """
    ends = lengths.prod(dim=1).cumsum(0)
    total = int(ends[-1])
    workers = max(1, min(torch.get_num_threads(), len(lengths), total // _CELLS_PER_THREAD))
    targets = torch.arange(1, workers) * total // workers
    borders = [0, *(torch.searchsorted(ends, targets) + 1).tolist(), len(lengths)]
    spans = [(first, last) for first, last in itertools.pairwise(borders) if first < last]
    with ThreadPoolExecutor(max(1, len(spans) - 1)) as pool:
        others = [pool.submit(kernel, *args, first, last) for first, last in spans[1:]]
        kernel(*args, *spans[0])
        for other in others:
            other.result()
