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

DIGIT = 11
BUCKETS = 2**DIGIT


def sorted_distance_cpu(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Compute sorted distances of float32 tensors; see `dwakd.kernels.sorted_distance` for arguments and results."""
    learned = learned.contiguous()
    distance, slope = learned.new_empty(len(learned)), torch.empty_like(learned)
    bits, opposite, total, sign = (tensor.numpy() for tensor in (learned.view(torch.int32), target, distance, slope))

    def rows(first: int, last: int) -> None:
        own = slice(first, last)
        _compiled(bits[own].view(np.uint32), np.sort(opposite[own], axis=1), total[own], sign[own])

    # one thread computes each row in a fixed order, so the result does not depend on the number of threads
    share(rows, [(row, row + 1) for row in range(len(learned))])
    return distance, slope


@no_type_check
@compiled_by_numba
def _starts(bits, starts):
    """Compute the start of each bucket of each digit."""
    starts[:] = 0
    for bit in bits:
        starts[0, bit & (BUCKETS - 1)] += 1
        starts[1, (bit >> DIGIT) & (BUCKETS - 1)] += 1
        starts[2, bit >> (2 * DIGIT)] += 1
    for digit in range(3):
        total = 0
        for bucket in range(BUCKETS):
            count = starts[digit, bucket]
            starts[digit, bucket] = total
            total += count


@no_type_check
@compiled_by_numba
def _pass(source, result, starts, shift):
    """Run one stable pass of the radix sort, by the bits of `source` from `shift` on."""
    for key in source:
        bucket = (key >> np.uint64(shift)) & np.uint64(BUCKETS - 1)
        result[starts[bucket]] = key
        starts[bucket] += 1


@no_type_check
@compiled_by_numba
def _sort(bits, starts, first, second):
    """Sort in ascending order into `first`: bits of the values in the upper half, their positions in the lower."""
    _starts(bits, starts)
    for place in range(bits.shape[0]):
        second[place] = (np.uint64(bits[place]) << np.uint64(32)) | np.uint64(place)
    _pass(second, first, starts[0], 32)
    _pass(first, second, starts[1], 32 + DIGIT)
    _pass(second, first, starts[2], 32 + 2 * DIGIT)


@no_type_check
@compiled_by_numba
def _compiled(learned_bits, opposite, distance, slope):
    starts = np.empty((3, BUCKETS), np.int32)
    width, other = learned_bits.shape[1], opposite.shape[1]
    ranked, work = np.empty(width, np.uint64), np.empty(width, np.uint64)
    # the upper half of a key is the value; which half comes first depends on the machine's byte order
    half = np.int64(np.array([1], np.uint64).view(np.uint32)[0])
    values = ranked.view(np.float32)[half::2]
    for row in range(learned_bits.shape[0]):
        _sort(learned_bits[row], starts, ranked, work)
        q, total = opposite[row], 0.0
        for rank in range(1, width + 1):
            value = values[width - rank]
            gap = value - q[other - rank] if rank <= other else value
            slope[row, ranked[width - rank] & np.uint64(0xFFFFFFFF)] = np.float32(gap > 0) - np.float32(gap < 0)
            total += abs(gap)
        for rank in range(width + 1, other + 1):
            total += q[other - rank]
        distance[row] = total
