"""Exact token alignment (DSKDv2, arXiv 2504.11426): tokens of the two sides that cover the same bytes of a response."""

import torch
from jaxtyping import Int
from torch import Tensor

from dwakd.losses.packing import example_ids, positions


def exact_partners(
    student_ends: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_ends: Int[Tensor, " t_tokens"],
    teacher_lengths: Int[Tensor, " batch"],
) -> Int[Tensor, " s_tokens"]:
    """For each student row the packed teacher row whose token starts and ends at the same bytes, or -1.

    Both sides have then read the same text and predict the same text. Tokens without bytes (end-of-sequence, marks of
    normalisation) pair up at equal places, the last with the last. Pairs are one-to-one, in order, never across
    examples, and the same from either side; no value of a tensor is waited for.

    Args:
        student_ends: `ModelSide.byte_ends`.
        student_lengths: rows per example.
        teacher_ends: likewise.
        teacher_lengths: likewise.
    """
    num_student, num_teacher = len(student_ends), len(teacher_ends)
    if num_student == 0 or num_teacher == 0:
        return torch.full_like(student_ends, -1)
    stride = torch.maximum(student_ends.max(), teacher_ends.max()) + 1
    student_places = example_ids(student_lengths, num_student) * stride + student_ends  # both ascend
    teacher_places = example_ids(teacher_lengths, num_teacher) * stride + teacher_ends
    student_starts, teacher_starts = _starts(student_ends, student_lengths), _starts(teacher_ends, teacher_lengths)

    # Of the tokens that end at one place the first alone may have bytes.
    first = torch.searchsorted(teacher_places, student_places)
    last = torch.searchsorted(teacher_places, student_places, right=True) - 1
    index = torch.arange(num_student, device=student_ends.device)
    behind = torch.searchsorted(student_places, student_places, right=True) - 1 - index
    wanted = torch.where(student_starts < student_ends, first, last - behind)
    found = wanted.clamp(0, num_teacher - 1)
    same = (teacher_places[found] == student_places) & (teacher_starts[found] == student_starts)
    return torch.where(same & (found == wanted), found, -1)


def _starts(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    return torch.where(positions(lengths, len(ends)) == 0, 0, ends.roll(1))
