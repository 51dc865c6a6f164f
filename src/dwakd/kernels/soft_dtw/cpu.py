"""Soft-DTW on the CPU with numba, parallel over the batch.

Accumulated costs are carried in float64, two anti-diagonals at a time. What the backward pass needs are the soft
minimum's three weights per cell: the forward pass keeps them, in the order of the anti-diagonals and in the costs'
own dtype (12 bytes a cell in float32), so that the backward pass has no exponentials.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.soft_dtw.cpu_loops import LANES, backward_batch, forward_batch

Counts = npt.NDArray[np.int64]

_CELLS_PER_THREAD = 50_000  # below this many cells a thread costs more than it brings


def soft_dtw_cpu(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Soft-DTW of float32 or float64 costs; arguments and guarantees are those of `dwakd.kernels.soft_dtw`."""
    lengths = np.stack([side.cpu().numpy().astype(np.int64) for side in (x_lengths, y_lengths)], axis=1)
    if torch.is_grad_enabled() and cost.requires_grad:
        value: Tensor = _SoftDtw.apply(cost, gamma, lengths)  # type: ignore[no-untyped-call]
        return value
    return _forward(cost, gamma, lengths, keep=False)[0]


class _SoftDtw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, lengths: Counts) -> Tensor:
        value, weights, ctx.starts = _forward(cost, gamma, lengths, keep=True)
        ctx.save_for_backward(value, weights)
        ctx.lengths, ctx.shape = lengths, cost.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        value, weights = ctx.saved_tensors
        grad_cost = grad_value.new_zeros(ctx.shape)
        grad_array = grad_value.contiguous().numpy()
        arrays = [grad_array, value.detach().numpy(), ctx.lengths, weights.numpy(), ctx.starts, grad_cost.numpy()]
        _over_batch(backward_batch, ctx.lengths, arrays)
        return grad_cost, None, None


def _forward(
    cost: Tensor, gamma: float, lengths: Counts, keep: bool
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " weights"], Counts]:
    """The values, the weights of every cell, and where each example's weights start (and the last one's end)."""
    shorter, longer = lengths.min(axis=1), lengths.max(axis=1)
    sizes = _padded(shorter)  # one diagonal, overwritten by the next
    if keep:
        # diagonals of 1, 2, ..., shorter - 1 cells, twice, and those of `shorter` cells
        blocks, rest = (shorter - 1) // LANES, (shorter - 1) % LANES
        rising = LANES * (LANES * blocks * (blocks + 1) // 2 + rest * (blocks + 1))
        sizes = 2 * rising + (longer - shorter + 1) * sizes
    starts = np.concatenate(([0], (3 * sizes).cumsum()))
    weights, value = cost.new_empty(int(starts[-1])), cost.new_empty(len(cost))
    arrays = [gamma, cost.detach().contiguous().numpy(), lengths, keep, weights.numpy(), starts, value.numpy()]
    _over_batch(forward_batch, lengths, arrays)
    return value, weights, starts


def _padded(cells: Counts) -> Counts:
    return (cells + LANES - 1) // LANES * LANES


def _over_batch(kernel: Callable[..., None], lengths: Counts, arrays: list[Any]) -> None:
    """Call kernel(*arrays, first, last) on ranges of examples of about equal work, one thread each.

    Plain threads that release the GIL: numba's own pool would be a second OpenMP runtime beside torch's. They live
    as long as the call, so a forked process inherits none. Each example is computed by one thread in one order: the
    result does not depend on their number.
    """
    ends = lengths.prod(axis=1).cumsum()
    workers = min(torch.get_num_threads(), len(lengths), int(ends[-1]) // _CELLS_PER_THREAD)
    if workers <= 1:
        kernel(*arrays, 0, len(lengths))
        return
    inner = np.searchsorted(ends, np.arange(1, workers) * int(ends[-1]) // workers) + 1
    spans = [(a, b) for a, b in itertools.pairwise([0, *inner.tolist(), len(lengths)]) if a < b]
    with ThreadPoolExecutor(workers - 1) as pool:
        others = [pool.submit(kernel, *arrays, first, last) for first, last in spans[1:]]
        kernel(*arrays, *spans[0])
        for other in others:
            other.result()
