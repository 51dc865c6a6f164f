"""Soft-DTW on the CPU with numba, parallel over the batch.

The gradient is computed with the value, example by example, while the soft minimum's weights are still in the
processor's cache: what stays until the backward pass is one number per cell.
"""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.kernels.soft_dtw.cpu_loops import solve_float32, solve_float64

Counts = npt.NDArray[np.int64]

_CELLS_PER_THREAD = 100_000  # about half a millisecond: below, waiting for another thread costs more than it brings
_CELLS_PER_SPAN = 20_000


def solve(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
    keep: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """The values, and where `keep` their gradients (else an empty tensor).

    This thread takes one span of examples after the other; others help as far as they come to run. None of them is
    waited for before it has begun, so that a busy processor, or a forked process without them, costs no time. They are
    plain threads that release the GIL: numba's own pool would be a second OpenMP runtime beside torch's. Each example is
    computed by one thread in one order: the result does not depend on their number.
    """
    lengths = np.stack([side.cpu().numpy().astype(np.int64) for side in (x_lengths, y_lengths)], axis=1)
    value, grad = cost.new_empty(len(cost)), cost.new_empty(cost.shape if keep else (0, 0, 0))
    kernel = solve_float32 if cost.dtype == torch.float32 else solve_float64
    arrays = [cost.detach().contiguous().numpy(), lengths, gamma, keep, value.numpy(), grad.numpy()]
    spans = _spans(lengths)
    num_helpers = min(torch.get_num_threads(), len(spans), int(lengths.prod(axis=1).sum()) // _CELLS_PER_THREAD) - 1
    rest = iter(spans)

    def work() -> None:
        for first, last in rest:
            kernel(*arrays, first, last)

    helpers = [_pool(num_helpers).submit(work) for _ in range(num_helpers)]
    work()
    for helper in helpers:
        if not helper.cancel():  # it has begun
            helper.result()
    return value, grad


def _spans(lengths: Counts) -> list[tuple[int, int]]:
    """Ranges of examples, each of about _CELLS_PER_SPAN cells or of one example."""
    parts = lengths.prod(axis=1).cumsum() // _CELLS_PER_SPAN
    ends = [*(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(lengths)]
    return list(itertools.pairwise([0, *ends]))


@functools.cache
def _pool(num_helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_helpers, thread_name_prefix="soft_dtw")
