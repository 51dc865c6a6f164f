"""Align the tokens of student and teacher by spelling, once for a data set (MinED)."""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.align.vocab import nearest_tokens, token_text
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import EncodedPairs, EncodedSide


def align_by_spelling(pairs: EncodedPairs, student: TextEncoder, *teachers: TextEncoder) -> None:
    """Set the `aligned_rows` of every teacher's side of `pairs`. Do nothing if all are already set.

    Dynamic time warping aligns the tokens that the models *read* at response positions, without their spaces. These
    start with the last token of the prompt and do not include the end token. A student token is aligned if the path
    pairs it with exactly one teacher token and `nearest_tokens` maps that token to the student's. Several student
    tokens may be aligned with the same teacher token.

    Args:
        pairs: encoded rows with all sides, changed in place.
        student: the student's encoder, which encoded the rows.
        teachers: the teachers' encoders, in the order of the sides.
    """
    if all(side.aligned_rows is not None for row in pairs.rows for side in row.teachers):
        return
    aligners = [_Aligner(student, teacher) for teacher in teachers]
    for index, row in enumerate(tqdm(pairs.rows, desc="aligning tokens", unit="row", delay=2, leave=False)):
        first, *others = (
            dataclasses.replace(side, aligned_rows=aligner(row.student, side))
            for aligner, side in zip(aligners, row.teachers, strict=True)
        )
        pairs.rows[index] = dataclasses.replace(row, teacher=first, others=tuple(others))


class _Aligner:
    """Find the aligned teacher token, or -1, for each student token of an example."""

    def __init__(self, student: TextEncoder, teacher: TextEncoder) -> None:
        mine, theirs = student.token_bytes(), teacher.token_bytes()
        self.student_of = nearest_tokens(theirs, mine, (teacher.end_token_id, student.end_token_id)).numpy()
        self.spellings = [
            ["\0" if token is None else token_text(token).replace(" ", "") for token in tokens]
            for tokens in (mine, theirs)
        ]

    def __call__(self, student: EncodedSide, teacher: EncodedSide) -> NDArray[np.int32]:
        from dwakd.align.edit_distance import edit_costs, one_to_one_rows  # numba loads slowly

        own, other = _read(student), _read(teacher)
        rows, _ = one_to_one_rows(
            edit_costs([self.spellings[0][index] for index in own], [self.spellings[1][index] for index in other])
        )
        accepted = (rows >= 0) & (self.student_of[other[np.maximum(rows, 0)]] == own)
        return np.where(accepted, rows, -1).astype(np.int32)


def _read(side: EncodedSide) -> NDArray[np.int32]:
    """Return the tokens that a model reads at response positions."""
    return side.ids[side.num_prompt - 1 : -1]
