"""Sorted distances on the CPU with numba: a radix sort of the bits of probabilities, row by row, in cache.

The bits of a non-negative float are in the order of its value: three passes over eleven bits each sort them, where
torch.sort compares. `no_type_check` keeps the tests' shape checker from wrapping what numba compiles.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DIGIT = 11
BUCKETS = 2**DIGIT


def sorted_distance_cpu(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Of float32 tensors; arguments and results are those of `dwakd.kernels.sorted_distance`."""
    learned, target = learned.contiguous(), target.contiguous()
    distance, slope = learned.new_empty(len(learned)), torch.empty_like(learned)
    arrays = [tensor.numpy() for tensor in (learned, target, distance, slope)]
    workers = min(torch.get_num_threads(), len(learned))
    if workers <= 1:
        _rows(*arrays)
        return distance, slope
    bounds = [len(learned) * index // workers for index in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        # a row is computed by one thread in one order: the result does not depend on their number
        parts = [
            pool.submit(_rows, *(array[first:last] for array in arrays)) for first, last in itertools.pairwise(bounds)
        ]
        for part in parts:
            part.result()
    return distance, slope


@no_type_check
@numba.njit(nogil=True, cache=True)
def _starts(bits, starts):
    """Where each bucket of each digit begins."""
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
@numba.njit(nogil=True, cache=True)
def _pass(source, result, starts, shift):
    """One stable pass of the radix sort, by the bits of `source` from `shift` on."""
    for key in source:
        bucket = (key >> np.uint64(shift)) & np.uint64(BUCKETS - 1)
        result[starts[bucket]] = key
        starts[bucket] += 1


@no_type_check
@numba.njit(nogil=True, cache=True)
def _sort(bits, starts, first, second):
    """`first` holds the values' bits in its upper half, ascending, and their places in the lower."""
    _starts(bits, starts)
    for place in range(bits.shape[0]):
        second[place] = (np.uint64(bits[place]) << np.uint64(32)) | np.uint64(place)
    _pass(second, first, starts[0], 32)
    _pass(first, second, starts[1], 32 + DIGIT)
    _pass(second, first, starts[2], 32 + 2 * DIGIT)


@no_type_check
def _rows(learned: Any, target: Any, distance: Any, slope: Any) -> None:
    _compiled(learned, learned.view(np.uint32), target.view(np.uint32), distance, slope)


@no_type_check
@numba.njit(nogil=True, cache=True)
def _compiled(learned, learned_bits, target_bits, distance, slope):
    starts = np.empty((3, BUCKETS), np.int32)
    width, other = learned.shape[1], target_bits.shape[1]
    own, theirs = np.empty(width, np.uint64), np.empty(other, np.uint64)
    own_work, their_work = np.empty(width, np.uint64), np.empty(other, np.uint64)
    # the upper halves of the keys are the values; which half comes first depends on the machine
    half = np.int64(np.array([1], np.uint64).view(np.uint32)[0])
    own_values, their_values = own.view(np.float32)[half::2], theirs.view(np.float32)[half::2]
    for row in range(learned.shape[0]):
        _sort(learned_bits[row], starts, own, own_work)
        _sort(target_bits[row], starts, theirs, their_work)
        p = learned[row]
        total, mean = 0.0, 0.0
        for rank in range(1, width + 1):
            place = own[width - rank] & np.uint64(0xFFFFFFFF)
            value = own_values[width - rank]
            gap = value - their_values[other - rank] if rank <= other else value
            sign = np.float32(gap > 0) - np.float32(gap < 0)
            slope[row, place] = sign
            total += abs(gap)
            mean += sign * value
        for rank in range(width + 1, other + 1):
            total += their_values[other - rank]
        distance[row] = total
        for place in range(width):
            slope[row, place] = p[place] * (slope[row, place] - np.float32(mean))
