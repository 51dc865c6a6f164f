"""Convert between packed and padded tokens, and check the sides that a caller passes to a loss."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.checks import require, require_targets
from dwakd.losses.record import is_recording

LONG = 2048
"""Longest response, in tokens, for which a batch keeps matrices of student and teacher tokens."""


def is_long(student: ModelSide, teacher: ModelSide) -> bool:
    """Return whether matrices of student and teacher tokens are too large to keep; False if they are recorded."""
    return max(*student.counts, *teacher.counts) > LONG and not is_recording()


def example_ids(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the example of each packed token."""
    index = torch.arange(lengths.shape[0], device=lengths.device)
    return index.repeat_interleave(lengths, output_size=num_tokens)


def positions(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the position of each packed token in its example, from 0."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(num_tokens, device=lengths.device) - starts[example_ids(lengths, num_tokens)]


def pad_rows(
    rows: Shaped[Tensor, "tokens width"], lengths: Int[Tensor, " batch"], length: int
) -> Shaped[Tensor, "batch length width"]:
    """Unpack vectors into one zero-padded matrix per example; differentiable."""
    tokens = rows.shape[0]
    padded = rows.new_zeros(lengths.shape[0], length, rows.shape[1])
    return padded.index_put((example_ids(lengths, tokens), positions(lengths, tokens)), rows)


def unpad_rows(
    padded: Float[Tensor, "batch length width"], lengths: Int[Tensor, " batch"], num_tokens: int
) -> Float[Tensor, "tokens width"]:
    """Pack the rows of padded matrices. This is the differentiable inverse of `pad_rows`."""
    return padded[example_ids(lengths, num_tokens), positions(lengths, num_tokens)]


def valid(lengths: Int[Tensor, " batch"], length: int) -> Bool[Tensor, "batch length"]:
    """Return a mask that is True at the positions of a padded matrix that hold a token."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def require_side(side: ModelSide, name: str) -> None:
    """Raise ValueError unless a side has tokens in each of its examples and its tensors have matching shapes.

    This does not wait for a GPU.

    Args:
        side: the student's or a teacher's side.
        name: "student" or "teacher", for the message.
    """
    count = len(side.target_ids)
    if count == 0 or len(side.lengths) == 0:
        raise ValueError(f"the {name}'s side has no response token; leave out batches without response tokens")
    for field in ("hidden", "input_embeddings", "target_embeddings", "byte_ends", "attention"):
        rows = getattr(side, field)
        if rows is not None and len(rows) != count:
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


def require_same_lengths(student: ModelSide, teacher: ModelSide, method: str) -> None:
    """Raise ValueError unless each example has the same number of tokens on both sides."""
    message = f"{method} with these options needs models that share one tokenizer"
    counts = [len(side.target_ids) for side in (student, teacher)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{message}, but the student's side has {counts[0]} tokens and the teacher's side {counts[1]}; "
            "encode the same responses for both"
        )
    require(
        (student.lengths == teacher.lengths).all(),
        f"{message}: teacher.lengths must equal student.lengths",
        lambda: f"{teacher.lengths.tolist()} and {student.lengths.tolist()}",
    )


def require_width(rows: Tensor, width: int, name: str, owner: str) -> None:
    """Raise ValueError unless a tensor has the width that its `owner`, a head or a map, was built for."""
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
