"""Pair the tokens of two tokenisations of one text by the bytes that they cover.

The end of a token is an offset in the bytes of the text. Inside text that normalisation changed, it is a negative
number, which can only be compared for equality with the other side's; see `TextEncoder.response_ids`.
All functions are vectorised over a packed batch of examples and never synchronise the device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

_RANK_BITS, _PLACE_BITS = 12, 31


@dataclass(frozen=True)
class ByteGroups:
    """Groups of student and teacher tokens that cover the same bytes, numbered from 0 over the batch, in order.

    A group cannot be split further: inside it, no token of one side ends where a token of the other side ends.

    Args:
        student: the group of each student token.
        teacher: the group of each teacher token.
        student_last: whether a student token is the last of its group.
        teacher_last: whether a teacher token is the last of its group.
    """

    student: Int[Tensor, " s_tokens"]
    teacher: Int[Tensor, " t_tokens"]
    student_last: Bool[Tensor, " s_tokens"]
    teacher_last: Bool[Tensor, " t_tokens"]


def byte_groups(
    student_ends: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_ends: Int[Tensor, " t_tokens"],
    teacher_lengths: Int[Tensor, " batch"],
) -> ByteGroups:
    """Group the student and teacher tokens that cover the same bytes.

    A group ends where a token of each side ends at the same offset. Several tokens of a side may have the same end:
    those after the first cover no bytes, as the end-of-sequence token does. Then the first is paired with the first of
    the other side, the second with the second, and so on. The last tokens of an example always end a group, even if
    their ends differ.

    Args:
        student_ends: `ModelSide.byte_ends` of the student.
        student_lengths: number of student tokens of each example, at least 1.
        teacher_ends: the same as `student_ends`, of the teacher.
        teacher_lengths: the same as `student_lengths`, of the teacher.
    """
    student_keys, teacher_keys = _keys(student_ends, student_lengths), _keys(teacher_ends, teacher_lengths)
    student_last = _shared(student_keys, student_ends, teacher_keys, teacher_ends)
    teacher_last = _shared(teacher_keys, teacher_ends, student_keys, student_ends)
    student, teacher = (last.cumsum(0) - last.long() for last in (student_last, teacher_last))
    return ByteGroups(student, teacher, student_last, teacher_last)


def exact_rows(
    student_ends: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_ends: Int[Tensor, " t_tokens"],
    teacher_lengths: Int[Tensor, " batch"],
) -> Int[Tensor, " s_tokens"]:
    """Find, for each student token, the teacher token with the same start and the same end.

    This is the exact alignment of DSKDv2 (arXiv 2504.11426): at such a pair both models have read the same text and
    predict the same text. Tokens that cover no bytes (the end-of-sequence token, a space put before the text) are
    paired at equal offsets, the last with the last. Pairs are one-to-one, in order, within one example, and do not
    change when student and teacher are swapped. The device is not synchronised.

    The arguments are those of `byte_groups`, except that an example may be empty.

    Returns:
        The index of the teacher token in the packed batch for each student token, or -1.
    """
    num_student, num_teacher = len(student_ends), len(teacher_ends)
    if num_student == 0 or num_teacher == 0:
        return torch.full_like(student_ends, -1)
    student_places, teacher_places = _places(student_ends, student_lengths), _places(teacher_ends, teacher_lengths)
    student_starts, teacher_starts = starts(student_ends, student_lengths), starts(teacher_ends, teacher_lengths)

    # Only the first of the tokens that end at the same offset can cover bytes.
    first = torch.searchsorted(teacher_places, student_places)
    last = torch.searchsorted(teacher_places, student_places, right=True) - 1
    index = torch.arange(num_student, device=student_ends.device)
    behind = torch.searchsorted(student_places, student_places, right=True) - 1 - index
    has_bytes = (student_starts < student_ends) & (student_ends >= 0)
    wanted = torch.where(has_bytes, first, last - behind)
    found = wanted.clamp(0, num_teacher - 1)
    same = (teacher_places[found] == student_places) & (teacher_ends[found] == student_ends)
    return torch.where(same & (teacher_starts[found] == student_starts) & (found == wanted), found, -1)


def read_rows(
    student_ends: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_ends: Int[Tensor, " t_tokens"],
    teacher_lengths: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, " s_tokens"], Bool[Tensor, " s_tokens"]]:
    """Find, for each student token, the last teacher token at which the teacher has read no more text than the student.

    The arguments are those of `byte_groups`. The device is not synchronised.

    Returns:
        The index of the teacher token in the packed batch, and whether both tokens start at the same place, so that
        both models have read the same text. Such pairs are one-to-one, the last of several at one place with the last.
    """
    own_first, first = (
        _examples(lengths, len(ends)) << (_PLACE_BITS + 1)
        for ends, lengths in ((student_ends, student_lengths), (teacher_ends, teacher_lengths))
    )
    least, most = text_read(student_ends, student_lengths)[0], text_read(teacher_ends, teacher_lengths)[1]
    latest = torch.searchsorted(first + most, own_first + least, right=True) - 1
    student = own_first + starts(student_ends, student_lengths) + (1 << _PLACE_BITS)
    teacher = first + starts(teacher_ends, teacher_lengths) + (1 << _PLACE_BITS)
    (own, own_order), (others, order) = student.sort(stable=True), teacher.sort(stable=True)
    rank = torch.empty_like(own_order).scatter_(0, own_order, torch.arange(len(own), device=own.device))
    behind = torch.searchsorted(own, student, right=True) - 1 - rank
    found = torch.searchsorted(others, student, right=True) - 1 - behind
    same = (found >= 0) & (others[found.clamp_min(0)] == student)
    return torch.where(same, order[found.clamp_min(0)], latest), same


def text_read(
    ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Return a lower and an upper bound of the bytes that a model has read when it predicts each token.

    Both are the start of the token where it is an offset. Inside text that normalisation changed, they are the offsets
    before and after it.
    """
    first, begun = _examples(lengths, len(ends)) << _PLACE_BITS, starts(ends, lengths)
    least = (first + begun.clamp(min=0)).cummax(0).values
    later = torch.where(begun < 0, torch.iinfo(begun.dtype).max, first + begun)
    later = torch.where(ends < 0, later, torch.minimum(later, first + ends))
    most = torch.where(begun < 0, later.flip(0).cummin(0).values.flip(0), least)
    return least - first, most - first


def starts(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    """Return the start of each token: the end of the token before it, or 0 for the first token of an example."""
    shifted = ends.roll(1)
    firsts = lengths.cumsum(0) - lengths
    index = torch.arange(len(ends), device=ends.device)
    return torch.where(index == firsts[_examples(lengths, len(ends))], 0, shifted)


def _keys(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    """Compute a strictly increasing key per token from its `_places` number and its rank among equal numbers."""
    index = torch.arange(len(ends), device=ends.device)
    places = _places(ends, lengths)
    rank = index - torch.searchsorted(places, places)
    example = _examples(lengths, len(ends))
    is_final = index == lengths.cumsum(0)[example] - 1
    return torch.where(is_final, ((example + 1) << (_PLACE_BITS + _RANK_BITS)) - 1, (places << _RANK_BITS) + rank)


def _places(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    """Compute one integer per token that orders all tokens of a batch, first by example, then by the end of the token.

    If the end of a token is a byte offset, the integer is even. If the end is unknown, the integer is that of the last
    known offset before the token, plus 1.
    """
    firsts = _examples(lengths, len(ends)) << _PLACE_BITS
    return (firsts + 2 * ends.clamp(min=0)).cummax(0).values + (ends < 0)


def _examples(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the index of the example to which each packed token belongs."""
    index = torch.arange(num_tokens, device=lengths.device)
    return torch.searchsorted(lengths.cumsum(0), index, right=True)


def _shared(
    keys: Int[Tensor, " tokens"],
    ends: Int[Tensor, " tokens"],
    other_keys: Int[Tensor, " others"],
    other_ends: Int[Tensor, " others"],
) -> Bool[Tensor, " tokens"]:
    """Return whether the other side has a token with the same key and, where the end is not an offset, the same end."""
    rows = torch.searchsorted(other_keys, keys).clamp(max=len(other_keys) - 1)
    return (other_keys[rows] == keys) & ((ends >= 0) | (other_ends[rows] == ends))


def sum_by_group(
    values: Shaped[Tensor, " tokens"], groups: Int[Tensor, " tokens"], size: int
) -> Shaped[Tensor, " {size}"]:
    """Sum the values of each group. Entries beyond the last group are 0. Differentiable."""
    return values.new_zeros(size).index_add(0, groups, values)


def tokens_per_group(
    groups: ByteGroups, student_lengths: Int[Tensor, " batch"], *, even: bool
) -> Float[Tensor, " s_tokens"]:
    """Compute a weight per group such that the weights of an example sum to its number of student tokens.

    Args:
        groups: the groups of a batch.
        student_lengths: number of student tokens of each example.
        even: True gives all groups of an example the same weight; False gives each group its number of student tokens.

    Returns:
        The weight of each group; 0 beyond the last group.
    """
    size = len(groups.student)
    if not even:
        return sum_by_group(torch.ones_like(groups.student, dtype=torch.float32), groups.student, size)
    example = _examples(student_lengths, size)
    last = groups.student_last.float()
    share = student_lengths / sum_by_group(last, example, len(student_lengths))
    return sum_by_group(last * share[example], groups.student, size)
