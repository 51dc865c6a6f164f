"""Compute sorted distances on the CPU with numpy's vectorised sort for `target` and a radix sort for `learned`.

The radix sort also gives the positions of the values. It relies on the bits of non-negative floats having the same
order as their values, and makes three passes over eleven bits each. `no_type_check` prevents the tests' shape checker
from wrapping the compiled functions.
"""

from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.compiled import compiled_by_numba, share

BUCKETS = 2**11
SHIFTS = (32, 43, 54)  # first bit of each digit in a key


def sorted_distance_cpu(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Compute sorted distances of float32 tensors, as `dwakd.kernels.sorted_distance.sorted_distance` does."""
    learned = learned.contiguous()
    distance, slope = learned.new_empty(len(learned)), torch.empty_like(learned)
    bits, opposite, total, sign = (tensor.numpy() for tensor in (learned.view(torch.int32), target, distance, slope))

    def rows(first: int, last: int) -> None:
        own = slice(first, last)
        _compiled(bits[own].view(np.uint32), np.sort(opposite[own], axis=1), total[own], sign[own])

    # one thread computes each row in a fixed order, so the result does not depend on the number of threads
    share(rows, [(row, row + 1) for row in range(len(learned))])
    return distance, slope


@compiled_by_numba
@no_type_check
def _sort(keys, work):
    """Sort keys in ascending order of their upper halves, in stable passes by one digit each; return the result."""
    for shift in SHIFTS:
        starts = np.zeros(BUCKETS + 1, np.int64)
        for key in keys:
            starts[((key >> np.uint64(shift)) & np.uint64(BUCKETS - 1)) + np.uint64(1)] += 1
        starts = starts.cumsum()
        for key in keys:
            bucket = (key >> np.uint64(shift)) & np.uint64(BUCKETS - 1)
            work[starts[bucket]] = key
            starts[bucket] += 1
        keys, work = work, keys
    return keys


@compiled_by_numba
@no_type_check
def _compiled(learned_bits, opposite, distance, slope):
    width, other = learned_bits.shape[1], opposite.shape[1]
    keys, work = np.empty(width, np.uint64), np.empty(width, np.uint64)
    for row in range(learned_bits.shape[0]):
        for place in range(width):
            keys[place] = (np.uint64(learned_bits[row, place]) << np.uint64(32)) | np.uint64(place)
        ranked = _sort(keys, work)
        q, total = opposite[row], 0.0
        for rank in range(1, width + 1):
            value = np.uint32(ranked[width - rank] >> np.uint64(32)).view(np.float32)
            gap = value - q[other - rank] if rank <= other else value
            slope[row, ranked[width - rank] & np.uint64(0xFFFFFFFF)] = np.float32(gap > 0) - np.float32(gap < 0)
            total += abs(gap)
        for rank in range(width + 1, other + 1):
            total += q[other - rank]
        distance[row] = total
