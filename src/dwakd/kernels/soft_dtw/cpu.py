"""Soft-DTW on the CPU with numba, parallel over the batch.

The gradient is computed with the value, example by example, while the soft minimum's weights are still in the
processor's cache: what stays until the backward pass is one number per cell.
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

    Each example is computed by one thread in one order: the result does not depend on their number.
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
    """Ranges of examples, each of about _CELLS_PER_SPAN cells or of one example."""
    parts = num_cells.cumsum() // _CELLS_PER_SPAN
    ends = [*(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(num_cells)]
    return list(itertools.pairwise([0, *ends]))
