"""Tokens of two tokenisations of one text, paired by the bytes they cover.

The end of a token is an offset in the bytes of the text or, inside text that normalisation changed, a negative number,
which is compared with the other side's but has no place among the offsets; see `TextEncoder.response_ids`.
Everything is vectorised over a packed ragged batch and waits for no device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

_RANK_BITS, _PLACE_BITS = 12, 31


@dataclass(frozen=True)
class ByteGroups:
    """The finest spans whose ends both tokenisations share, numbered from 0 over the whole batch, in order.

    Args:
        student: the group of each student token.
        teacher: the group of each teacher token.
        student_last: whether a student token is the last of its group.
        teacher_last: likewise.
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
    """Groups of student and teacher tokens that cover the same bytes, as two pointers over both would find them.

    A group closes where both sides have a token with the same end. Of several tokens with one end (those
    after the first cover nothing, as end-of-sequence does) the first is paired with the first, the second with the
    second. The last tokens of an example always close a group, whatever their ends.

    Args:
        student_ends: `ModelSide.byte_ends`.
        student_lengths: tokens per example, at least 1.
        teacher_ends: likewise.
        teacher_lengths: likewise.
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
    """For each student row the packed teacher row whose token has the same start and the same end, or -1.

    DSKDv2's exact alignment (arXiv 2504.11426): both sides have then read the same text and predict the same text. Tokens
    without bytes (end-of-sequence, a space put before the text) pair up at equal places, the last with the last. Pairs are
    one-to-one, in order, never across examples, and the same from either side; no value of a tensor is waited for.

    Args:
        student_ends: `ModelSide.byte_ends`.
        student_lengths: rows per example.
        teacher_ends: likewise.
        teacher_lengths: likewise.
    """
    num_student, num_teacher = len(student_ends), len(teacher_ends)
    if num_student == 0 or num_teacher == 0:
        return torch.full_like(student_ends, -1)
    student_places, teacher_places = _places(student_ends, student_lengths), _places(teacher_ends, teacher_lengths)
    student_starts, teacher_starts = starts(student_ends, student_lengths), starts(teacher_ends, teacher_lengths)

    # Of the tokens that end at one offset the first alone may have bytes.
    first = torch.searchsorted(teacher_places, student_places)
    last = torch.searchsorted(teacher_places, student_places, right=True) - 1
    index = torch.arange(num_student, device=student_ends.device)
    behind = torch.searchsorted(student_places, student_places, right=True) - 1 - index
    has_bytes = (student_starts < student_ends) & (student_ends >= 0)
    wanted = torch.where(has_bytes, first, last - behind)
    found = wanted.clamp(0, num_teacher - 1)
    same = (teacher_places[found] == student_places) & (teacher_ends[found] == student_ends)
    return torch.where(same & (teacher_starts[found] == student_starts) & (found == wanted), found, -1)


def starts(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    """Where each token starts: the end of the one before it, 0 for an example's first."""
    shifted = ends.roll(1)
    firsts = lengths.cumsum(0) - lengths
    return torch.where(torch.isin(torch.arange(len(ends), device=ends.device), firsts), 0, shifted)


def _keys(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    """One strictly rising number per token: its place, and its rank among the tokens with that place."""
    index = torch.arange(len(ends), device=ends.device)
    places = _places(ends, lengths)
    rank = index - torch.searchsorted(places, places)
    example = _examples(lengths, len(ends))
    is_final = index == lengths.cumsum(0)[example] - 1
    return torch.where(is_final, ((example + 1) << (_PLACE_BITS + _RANK_BITS)) - 1, (places << _RANK_BITS) + rank)


def _places(ends: Int[Tensor, " tokens"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
    """One number per token, never falling: its example and its end, or just behind the offset before it if it has none.

    Tokens with an offset have even numbers, the others have odd ones.
    """
    firsts = _examples(lengths, len(ends)) << _PLACE_BITS
    return (firsts + 2 * ends.clamp(min=0)).cummax(0).values + (ends < 0)


def _examples(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """The example of each packed token."""
    index = torch.arange(num_tokens, device=lengths.device)
    return torch.searchsorted(lengths.cumsum(0), index, right=True)


def _shared(
    keys: Int[Tensor, " tokens"],
    ends: Int[Tensor, " tokens"],
    other_keys: Int[Tensor, " others"],
    other_ends: Int[Tensor, " others"],
) -> Bool[Tensor, " tokens"]:
    """Whether the other side has a token of the same key; without an offset, also of the same end."""
    rows = torch.searchsorted(other_keys, keys).clamp(max=len(other_keys) - 1)
    return (other_keys[rows] == keys) & ((ends >= 0) | (other_ends[rows] == ends))


def sum_by_group(
    values: Shaped[Tensor, " tokens"], groups: Int[Tensor, " tokens"], size: int
) -> Shaped[Tensor, " {size}"]:
    """The sum of each group's values, by group; 0 beyond the last group. Differentiable."""
    return values.new_zeros(size).index_add(0, groups, values)


def tokens_per_group(
    groups: ByteGroups, student_lengths: Int[Tensor, " batch"], *, even: bool
) -> Float[Tensor, " s_tokens"]:
    """Weights of groups that sum to the student's tokens, by group; 0 beyond the last group.

    Args:
        groups: of a batch.
        student_lengths: tokens per example.
        even: the groups of an example share its tokens evenly; else each has its own.
    """
    size = len(groups.student)
    if not even:
        return sum_by_group(torch.ones_like(groups.student, dtype=torch.float32), groups.student, size)
    example = torch.searchsorted(
        student_lengths.cumsum(0), torch.arange(size, device=student_lengths.device), right=True
    )
    last = groups.student_last.float()
    share = student_lengths / sum_by_group(last, example, len(student_lengths))
    return sum_by_group(last * share[example], groups.student, size)
