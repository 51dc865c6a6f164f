"""Divide a batch of response tokens into chunks whose logits fit a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dwakd.kernels.head_loss.criterion import Chunk


@dataclass(frozen=True)
class Group:
    """Chunks that are weighted together. With more than one, a separate pass computes their statistics."""

    chunks: tuple[Chunk, ...]
    examples: slice | None = None


def plan_rows(num_rows: int, num_sides: int, row_bytes: int, budget: int) -> list[Group]:
    """Divide the batch into chunks of nearly equal size; an example may be divided."""
    return [Group((chunk,)) for chunk in _even(0, num_rows, num_sides, row_bytes, budget)]


def plan_examples(
    lengths: Sequence[Sequence[int]], row_bytes: Sequence[int], budget: int, *, divisible: bool
) -> list[Group]:
    """Divide the batch into chunks of whole examples.

    An example above the budget becomes a group of several chunks if `divisible`, else a single chunk.

    Args:
        lengths: number of tokens of each example, for each side.
        row_bytes: bytes of logits per token, for each side.
        budget: most bytes of logits per chunk.
        divisible: whether an example may be divided; the sides then have the same lengths.
    """
    groups: list[Group] = []
    starts = [0] * len(lengths)
    ends = [0] * len(lengths)
    first, held = 0, 0
    for example, counts in enumerate(zip(*lengths, strict=True)):
        size = sum(count * width for count, width in zip(counts, row_bytes, strict=True))
        if held + size > budget and first < example:
            groups.append(_whole(starts, ends, first, example))
            starts, first, held = list(ends), example, 0
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        held += size
        if divisible and size > budget:
            parts = _even(starts[0], ends[0], len(lengths), sum(row_bytes), budget)
            groups.append(Group(tuple(parts), slice(first, example + 1)))
            starts, first, held = list(ends), example + 1, 0
    if first < len(lengths[0]):
        groups.append(_whole(starts, ends, first, len(lengths[0])))
    return groups


def _whole(starts: Sequence[int], ends: Sequence[int], first: int, stop: int) -> Group:
    examples = slice(first, stop)
    return Group((Chunk(tuple(map(slice, starts, ends)), examples),), examples)


def _even(start: int, stop: int, num_sides: int, row_bytes: int, budget: int) -> list[Chunk]:
    """Divide a range into equal chunks; a small last chunk would have slow matrix products."""
    per_chunk = max(budget // row_bytes, 1)
    count = -(-(stop - start) // per_chunk)
    bounds = [start + (stop - start) * index // count for index in range(count + 1)] if count else [start]
    return [Chunk((slice(a, b),) * num_sides) for a, b in pairwise(bounds)]
