"""Checks of the two sides that a caller passes to a loss. They run once per forward pass and do not wait for a GPU."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.checks import require, require_targets


def require_side(side: ModelSide, name: str) -> None:
    """Raise ValueError unless a side has tokens in each of its examples and its tensors have matching shapes.

    Args:
        side: the student's or a teacher's side.
        name: "student" or "teacher", for the message.
    """
    count = len(side.target_ids)
    if count == 0 or len(side.lengths) == 0:
        raise ValueError(f"the {name}'s side has no response token; leave out batches without response tokens")
    for field, rows in _tensors(side):
        if len(rows) != count:
            raise ValueError(
                f"{name}.{field} must have {count} tokens, as {name}.target_ids has, but it has {len(rows)}"
            )
    require_width(side.hidden, side.head.hidden_size, f"{name}.hidden", f"{name}.head")
    lengths = side.lengths
    require(
        (lengths.min() >= 1) & (lengths.sum() == count),
        f"{name}.lengths must be at least 1 for each example and sum to the {count} tokens",
        lengths.tolist,
    )
    require_targets(f"{name}.target_ids", side.target_ids, side.head.vocab_size)


def require_both(student: ModelSide, teacher: ModelSide) -> None:
    """Call `require_side` for both sides, and raise ValueError unless they have the same number of examples."""
    require_side(student, "student")
    require_side(teacher, "teacher")
    if len(student.lengths) != len(teacher.lengths):
        raise ValueError(
            f"the student's side has {len(student.lengths)} examples and the teacher's side {len(teacher.lengths)}; "
            "pass the same examples on both sides"
        )


def require_same_lengths(student: ModelSide, teacher: ModelSide, method: str) -> None:
    """Raise ValueError unless each example has the same number of tokens on both sides.

    Args:
        student: the student's side.
        teacher: the teacher's side.
        method: name of the method, for the message.
    """
    counts = [side.target_ids.shape[0] for side in (student, teacher)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{method} with these options needs models that share one tokenizer, but the student's side has "
            f"{counts[0]} tokens and the teacher's side {counts[1]}; encode the same responses for both"
        )
    require(
        (student.lengths == teacher.lengths).all(),
        f"{method} with these options needs models that share one tokenizer: teacher.lengths must equal student.lengths",
        lambda: f"{teacher.lengths.tolist()} and {student.lengths.tolist()}",
    )


def require_width(rows: Tensor, width: int, name: str, owner: str) -> None:
    """Raise ValueError unless a tensor has the width that a head or a map was built for.

    Args:
        rows: the tensor, one vector per token.
        width: the expected number of columns.
        name: name of the tensor, for the message.
        owner: name of the head or map that expects this width, for the message.
    """
    if rows.shape[-1] != width:
        raise ValueError(f"{name} must have {width} columns to fit {owner}, but it has {rows.shape[-1]}")


def require_vocabularies(sides: Sequence[ModelSide], sizes: Sequence[int]) -> None:
    """Raise ValueError unless the heads have the vocabulary sizes for which a method's token maps were built."""
    for name, side, size in zip(("student", "teacher"), sides, sizes, strict=True):
        if side.head.vocab_size != size:
            raise ValueError(
                f"{name}.head must have {size} vocabulary entries, as in the pair that the loss was built from, "
                f"but it has {side.head.vocab_size}"
            )


def _tensors(side: ModelSide) -> Iterator[tuple[str, Tensor]]:
    for field in ("hidden", "input_embeddings", "target_embeddings", "byte_ends", "attention"):
        rows = getattr(side, field)
        if rows is not None:
            yield field, rows
