"""Compute Soft-DTW on the CPU with numba, in parallel over the batch.

The gradient of an example is computed together with its value, while the weights of the soft minimum are still in the
processor's cache. Only one number per cell is stored for the backward pass.
"""

import itertools

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.kernels.compiled import share
from dwakd.kernels.soft_dtw.cpu_exact import solve_exact
from dwakd.kernels.soft_dtw.cpu_fast import solve_fast

Counts = npt.NDArray[np.int64]

_CELLS_PER_THREAD = 100_000  # about half a millisecond; with less work, a second thread saves no time
_CELLS_PER_SPAN = 20_000


def solve(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
    keep: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """Compute the values and, if `keep` is true, their gradients (else an empty tensor).

    One thread computes each example in a fixed order, so the result does not depend on the number of threads.
    """
    lengths = [side.long().contiguous().numpy() for side in (x_lengths, y_lengths)]
    value, grad = cost.new_empty(len(cost)), cost.new_empty(cost.shape if keep else (0, 0, 0))
    is_fast = cost.dtype == torch.float32
    is_open = np.empty(len(cost), bool) if is_fast else np.ones(len(cost), bool)
    arguments = [cost.detach().contiguous().numpy(), *lengths, gamma, keep, value.numpy(), grad.numpy(), is_open]

    def compute(first: int, last: int) -> None:
        if not is_fast or solve_fast(*arguments, first, last):
            solve_exact(*arguments, first, last)

    num_threads = min(torch.get_num_threads(), cost.numel() // _CELLS_PER_THREAD)
    if num_threads > 1:
        share(compute, _spans(lengths[0] * lengths[1]), num_threads)
    else:
        compute(0, len(cost))
    return value, grad


def _spans(num_cells: Counts) -> list[tuple[int, int]]:
    """Divide the examples into ranges of about _CELLS_PER_SPAN cells; a larger example has a range of its own."""
    parts = num_cells.cumsum() // _CELLS_PER_SPAN
    ends = [*(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(num_cells)]
    return list(itertools.pairwise([0, *ends]))
