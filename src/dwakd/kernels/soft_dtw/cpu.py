"""Soft-DTW on the CPU with numba, parallel over the batch.

The gradient is computed with the value, example by example, while the soft minimum's weights are still in the
processor's cache: what stays until the backward pass is one number per cell.
"""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.soft_dtw.cpu_loops import solve_float32, solve_float64

Counts = npt.NDArray[np.int64]

_CELLS_PER_THREAD = 100_000  # about half a millisecond: below, waiting for another thread costs more than it brings
_CELLS_PER_SPAN = 20_000


def soft_dtw_cpu(cost: Float[Tensor, "batch n m"], gamma: float, lengths: Counts) -> Float[Tensor, " batch"]:
    """Soft-DTW of float32 or float64 costs; guarantees are those of `dwakd.kernels.soft_dtw`."""
    if torch.is_grad_enabled() and cost.requires_grad:
        value: Tensor = _SoftDtw.apply(cost, gamma, lengths)  # type: ignore[no-untyped-call]
        return value
    return solve(cost, gamma, lengths, keep=False)[0]


class _SoftDtw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, lengths: Counts) -> Tensor:
        value, grad_cost = solve(cost, gamma, lengths, keep=True)
        ctx.save_for_backward(grad_cost)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        (grad_cost,) = ctx.saved_tensors
        return grad_cost * grad_value[:, None, None], None, None


def solve(
    cost: Float[Tensor, "batch n m"], gamma: float, lengths: Counts, keep: bool
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """The values, and where `keep` their gradients (else an empty tensor).

    This thread takes one span of examples after the other; others help as far as they come to run. None of them is
    waited for before it has begun, so that a busy processor, or a forked process without them, costs no time. They are
    plain threads that release the GIL: numba's own pool would be a second OpenMP runtime beside torch's. Each example is
    computed by one thread in one order: the result does not depend on their number.
    """
    value, grad_cost = cost.new_empty(len(cost)), cost.new_empty(cost.shape if keep else (0, 0, 0))
    kernel = solve_float32 if cost.dtype == torch.float32 else solve_float64
    arrays = [cost.detach().contiguous().numpy(), lengths, gamma, keep, value.numpy(), grad_cost.numpy()]
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
    return value, grad_cost


def _spans(lengths: Counts) -> list[tuple[int, int]]:
    """Ranges of examples, each of about _CELLS_PER_SPAN cells or of one example."""
    parts = lengths.prod(axis=1).cumsum() // _CELLS_PER_SPAN
    ends = [*(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(lengths)]
    return list(itertools.pairwise([0, *ends]))


@functools.cache
def _pool(num_helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_helpers, thread_name_prefix="soft_dtw")
