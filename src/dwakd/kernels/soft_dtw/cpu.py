"""Soft-DTW on the CPU with numba, parallel over the batch.

Accumulated costs are carried in float64 and only two anti-diagonals of them exist at a time. What the backward pass
needs are the soft minimum's three weights per cell: the forward pass keeps them, in the order of the anti-diagonals
and in the costs' own dtype (12 bytes a cell in float32), so that the backward pass has no exponentials. The loops over
a diagonal are split so that each touches few arrays and one width of float: that is what lets the compiler vectorise.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.soft_dtw.cpu_loops import LANES, backward_batch, forward_batch

_CELLS_PER_THREAD = 50_000  # below this many cells a thread costs more than it brings


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
    return _forward(cost, gamma, lengths, keep=False)[0]


class _SoftDtw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, lengths: Tensor) -> Tensor:
        value, weights, starts = _forward(cost, gamma, lengths, keep=True)
        ctx.save_for_backward(value, lengths, weights, starts)
        ctx.shape = cost.shape
        return value

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        value, lengths, weights, starts = ctx.saved_tensors
        grad_cost = grad_value.new_zeros(ctx.shape)
        tensors = (grad_value.contiguous(), value, lengths, weights, starts, grad_cost)
        _over_batch(backward_batch, lengths, [tensor.numpy() for tensor in tensors])
        return grad_cost, None, None


def _forward(
    cost: Tensor, gamma: float, lengths: Tensor, keep: bool
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " weights"], Int[Tensor, " starts"]]:
    """The values, the weights of every cell, and where each example's weights start (and the last one's end)."""
    shorter = lengths.amin(dim=1)
    if keep:
        # diagonals of 1, 2, ..., shorter - 1 cells, twice, and those of `shorter` cells
        blocks, rest = (shorter - 1) // LANES, (shorter - 1) % LANES
        rising = LANES * (LANES * blocks * (blocks + 1) // 2 + rest * (blocks + 1))
        sizes = 2 * rising + (lengths.amax(dim=1) - shorter + 1) * _padded(shorter)
    else:  # every diagonal of an example overwrites the one before
        sizes = _padded(shorter)
    starts = torch.nn.functional.pad((3 * sizes).cumsum(0), (1, 0))
    weights, value = cost.new_empty(int(starts[-1])), cost.new_empty(len(cost))
    arrays = [tensor.numpy() for tensor in (cost.detach().contiguous(), lengths, weights, starts, value)]
    _over_batch(forward_batch, lengths, [np.float64(gamma), *arrays[:2], keep, *arrays[2:]])
    return value, weights, starts


def _padded(cells: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    return (cells + LANES - 1) // LANES * LANES


def _over_batch(kernel: Callable[..., None], lengths: Tensor, args: list[Any]) -> None:
    """Call kernel(*args, first, last) on ranges of examples of about equal work, one thread each.

    Plain threads that release the GIL: numba's own pool would be a second OpenMP runtime beside torch's. They live
    as long as the call, so a forked process inherits none. Each example is computed by one thread in one order: the
    result does not depend on their number.
    """
    ends = lengths.prod(dim=1).cumsum(0)
    total = int(ends[-1])
    workers = min(torch.get_num_threads(), len(lengths), total // _CELLS_PER_THREAD)
    if workers <= 1:
        kernel(*args, 0, len(lengths))
        return
    targets = torch.arange(1, workers) * total // workers
    borders = [0, *(torch.searchsorted(ends, targets) + 1).tolist(), len(lengths)]
    spans = [(first, last) for first, last in itertools.pairwise(borders) if first < last]
    with ThreadPoolExecutor(workers - 1) as pool:
        others = [pool.submit(kernel, *args, first, last) for first, last in spans[1:]]
        kernel(*args, *spans[0])
        for other in others:
            other.result()
