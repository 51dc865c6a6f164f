"""Checks of what a caller hands to a loss: once per forward pass, without waiting for a GPU."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.checks import require, require_targets


def require_side(side: ModelSide, name: str) -> None:
    """Raise ValueError unless a side has rows, in examples that each have some, of tensors that fit each other.

    Args:
        side: of the batch.
        name: "student" or "teacher".
    """
    count = len(side.target_ids)
    if count == 0 or len(side.lengths) == 0:
        raise ValueError(f"the {name}'s side has no rows: leave out batches without a response token")
    for field, rows in _rows(side):
        if len(rows) != count:
            raise ValueError(f"expects {count} rows of {name}.{field}, one for each of target_ids, got {len(rows)}")
    require_width(side.hidden, side.head.hidden_size, f"{name}.hidden, the width of {name}.head")
    lengths = side.lengths
    require(
        (lengths.min() >= 1) & (lengths.sum() == count),
        f"{name}.lengths must be at least 1 for each example and sum to the {count} rows",
        lengths.tolist,
    )
    require_targets(f"{name}.target_ids", side.target_ids, side.head.vocab_size)


def require_both(student: ModelSide, teacher: ModelSide) -> None:
    """`require_side` of two sides, which must be of the same examples."""
    require_side(student, "student")
    require_side(teacher, "teacher")
    if len(student.lengths) != len(teacher.lengths):
        raise ValueError(
            f"expects the same examples on both sides, got {len(student.lengths)} of the student and "
            f"{len(teacher.lengths)} of the teacher"
        )


def require_width(rows: Tensor, width: int, what: str) -> None:
    """Raise ValueError unless rows have the width that a head or a map takes."""
    if rows.shape[-1] != width:
        raise ValueError(f"expects {width} columns of {what}, got {rows.shape[-1]}")


def require_vocabularies(sides: Sequence[ModelSide], sizes: Sequence[int]) -> None:
    """Raise ValueError unless the heads are as large as those that a method's map of tokens was built from."""
    for name, side, size in zip(("student", "teacher"), sides, sizes, strict=True):
        if side.head.vocab_size != size:
            raise ValueError(
                f"expects {size} rows of {name}.head, those of the pair that the loss was built from, "
                f"got {side.head.vocab_size}"
            )


def _rows(side: ModelSide) -> Iterator[tuple[str, Tensor]]:
    for field in ("hidden", "input_embeddings", "target_embeddings", "byte_ends", "aligned_rows", "attention"):
        rows = getattr(side, field)
        if rows is not None:
            yield field, rows
