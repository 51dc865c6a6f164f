"""Rows of two tokenisations aligned by the spelling of their tokens, once for a data set (MinED)."""

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.align.vocab import nearest_tokens, token_text
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import EncodedPairs, EncodedSide


def align_by_spelling(pairs: EncodedPairs, student: TextEncoder, teacher: TextEncoder) -> None:
    """Give `pairs` its `aligned_rows`, if it has none yet.

    The tokens that are *read* at response rows are warped onto each other, without their spaces: the last token of
    the prompt is the first, the end token is not among them. A row is aligned where exactly one teacher row falls on
    it and the teacher's token maps onto the student's (`nearest_tokens`).

    Args:
        pairs: rows with both sides.
        student: the encoder they were made with.
        teacher: likewise.
    """
    if pairs.aligned_rows is not None:
        return
    from dwakd.align.edit_distance import edit_costs, one_to_one_rows  # numba takes half a second: only when used

    mine, theirs = student.token_bytes(), teacher.token_bytes()
    student_of = nearest_tokens(theirs, mine, (teacher.end_token_id, student.end_token_id)).numpy()
    spellings = [
        ["\0" if token is None else token_text(token).replace(" ", "") for token in tokens] for tokens in (mine, theirs)
    ]
    pairs.aligned_rows = []
    for row in tqdm(pairs.rows, desc="aligning tokens", unit="row", delay=2, leave=False):
        assert row.teacher is not None
        own, other = _read(row.student), _read(row.teacher)
        costs = edit_costs([spellings[0][index] for index in own], [spellings[1][index] for index in other])
        rows, _ = one_to_one_rows(costs)
        accepted = (rows >= 0) & (student_of[other[np.maximum(rows, 0)]] == own)
        pairs.aligned_rows.append(np.where(accepted, rows, -1).astype(np.int32))


def _read(side: EncodedSide) -> NDArray[np.int32]:
    """The tokens read at response rows."""
    return side.ids[side.num_prompt - 1 : -1]
