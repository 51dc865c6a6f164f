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
    starts = ends = [0] * len(lengths)
    first, held = 0, 0

    def finish(stop: int) -> None:
        """Make the examples from `first` to `stop` - 1 a group of one chunk."""
        nonlocal starts, first, held
        if first < stop:
            chunk = Chunk(tuple(map(slice, starts, ends)), slice(first, stop))
            groups.append(Group((chunk,), chunk.examples))
        starts, first, held = ends, stop, 0

    for example, counts in enumerate(zip(*lengths, strict=True)):
        size = sum(count * width for count, width in zip(counts, row_bytes, strict=True))
        if held + size > budget:
            finish(example)
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        held += size
        if divisible and size > budget:
            parts = _even(starts[0], ends[0], len(lengths), sum(row_bytes), budget)
            groups.append(Group(tuple(parts), slice(example, example + 1)))
            starts, first, held = ends, example + 1, 0
    finish(len(lengths[0]))
    return groups


def _even(start: int, stop: int, num_sides: int, row_bytes: int, budget: int) -> list[Chunk]:
    """Divide a range into equal chunks; a small last chunk would have slow matrix products."""
    per_chunk = max(budget // row_bytes, 1)
    count = -(-(stop - start) // per_chunk)
    bounds = [start + (stop - start) * index // count for index in range(count + 1)] if count else [start]
    return [Chunk((slice(a, b),) * num_sides) for a, b in pairwise(bounds)]
