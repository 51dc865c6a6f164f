"""Find the nearest of many strings by edit distance. A compiled bit-parallel search with bounds skips most pairs."""

from typing import Any, no_type_check

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WORD = 64
"""Maximum length of a query, which must fit into one machine word."""
_OWN_BITS = 48

Codes = npt.NDArray[np.int32]
Bounds = npt.NDArray[np.int64]


def codes(strings: list[str]) -> tuple[Codes, Bounds]:
    """Concatenate the code points of all strings and return them with the start of each string and the end of all."""
    bounds = np.zeros(len(strings) + 1, np.int64)
    np.cumsum([len(string) for string in strings], out=bounds[1:])
    flat = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32)
    return flat.astype(np.int32), bounds


def rank_codes(*texts: Codes) -> list[Codes]:
    """Replace each code point by its rank in frequency, counted over all texts; the most frequent becomes 0."""
    points, counts = np.unique(np.concatenate(texts), return_counts=True)
    ranks = np.empty(len(points), np.int32)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(points), dtype=np.int32)
    return [ranks[np.searchsorted(points, text)] for text in texts]


def bags(text: Codes, bounds: Bounds) -> npt.NDArray[np.uint64]:
    """Encode the set of characters of each string as 64 bits. Rare characters share bits, frequent ones do not."""
    shared = _OWN_BITS + text % (WORD - _OWN_BITS)
    bits = np.left_shift(np.uint64(1), np.where(text < _OWN_BITS, text, shared).astype(np.uint64))
    sets = np.bitwise_or.reduceat(np.append(bits, np.uint64(0)), bounds[:-1])
    return np.where(bounds[1:] > bounds[:-1], sets, np.uint64(0))


@intrinsic  # type: ignore[untyped-decorator]
def count_bits(_context: Any, word: Any) -> Any:
    """Count the bits set in a word with the processor's instruction."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(word), generate


@no_type_check
def _nearest(queries, query_bounds, query_bags, texts, text_bounds, text_bags, num_codes, first, stop, out):
    """Set out[q] to the first text of least edit distance to query q, for first <= q < stop; queries have 1 to 64 codes."""
    one = np.uint64(1)
    masks = np.zeros(num_codes, np.uint64)
    for q in range(first, stop):
        begin, end = query_bounds[q], query_bounds[q + 1]
        length = end - begin
        for k in range(length):
            masks[queries[begin + k]] |= one << np.uint64(k)
        top, bag = one << np.uint64(length - 1), query_bags[q]
        best, best_text = 1 << 30, 0
        for t in range(len(text_bags)):
            start, size = text_bounds[t], text_bounds[t + 1] - text_bounds[t]
            # Each of these numbers is a lower bound of the edit distance.
            if abs(size - length) >= best:
                continue
            if np.int64(count_bits(bag & ~text_bags[t])) >= best or np.int64(count_bits(text_bags[t] & ~bag)) >= best:
                continue
            plus, minus, distance = ~np.uint64(0), np.uint64(0), length
            for k in range(size):  # Myers (1999) in the form of Hyyrö (2003)
                equal = masks[texts[start + k]]
                zero = (((equal & plus) + plus) ^ plus) | equal | minus
                rise, fall = minus | ~(zero | plus), plus & zero
                distance += np.int64((rise & top) != 0) - np.int64((fall & top) != 0)
                rise, fall = (rise << one) | one, fall << one
                plus, minus = fall | ~(zero | rise), rise & zero
            if distance < best:
                best, best_text = distance, t
                if best <= 1:  # the caller has already matched equal strings, so the distance is never 0
                    break
        for k in range(length):
            masks[queries[begin + k]] = np.uint64(0)
        out[q] = best_text


nearest = numba.njit(nogil=True, error_model="numpy")(_nearest)
