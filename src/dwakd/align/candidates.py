"""Match the candidate tokens of two models at the same position by normalised edit distance, compiled with numba."""

from collections.abc import Sequence
from typing import no_type_check

import numba
import numpy as np
import numpy.typing as npt

from dwakd.align.nearest import bags, codes, count_bits, rank_codes

Candidates = npt.NDArray[np.int64]

NONE = -1


class CandidateMatcher:
    """Find, for each candidate token of one model, the nearest candidate of the other model at the same position.

    The normalised distance is the edit distance divided by the sum of both lengths.

    Args:
        student_texts: text of each student token by id; None for tokens that must stay unmatched.
        teacher_texts: text of each teacher token by id, in the same form.
        threshold: tokens are matched only if their normalised distance is below this number.
    """

    def __init__(
        self, student_texts: Sequence[str | None], teacher_texts: Sequence[str | None], threshold: float
    ) -> None:
        sides = [[text or "" for text in texts] for texts in (student_texts, teacher_texts)]
        (student_codes, student_bounds), (teacher_codes, teacher_bounds) = (codes(texts) for texts in sides)
        ranked = rank_codes(student_codes, teacher_codes)
        self.arguments = tuple(
            (text, bounds, bags(text, bounds), np.array([text is not None for text in texts]))
            for text, bounds, texts in zip(
                ranked, (student_bounds, teacher_bounds), (student_texts, teacher_texts), strict=True
            )
        )
        self.longest = max(len(text) for texts in sides for text in texts)
        self.threshold = threshold

    def __call__(self, student: Candidates, teacher: Candidates) -> tuple[Candidates, Candidates]:
        """Match the candidates at each position. The first of several equally near candidates is taken.

        Args:
            student: token ids of the student's candidates, (positions, candidates).
            teacher: token ids of the teacher's candidates, (positions, candidates).

        Returns:
            The student token for each candidate of the teacher, and the teacher token for each candidate of the
            student; `NONE` for a candidate without a match.
        """
        student_for, teacher_for = np.full_like(teacher, NONE), np.full_like(student, NONE)
        work = np.zeros(self.longest + 1, np.int64)
        _match(student, teacher, *self.arguments, self.threshold, work, student_for, teacher_for)
        return student_for, teacher_for


@no_type_check
def _edit_distance(a, a_start, a_end, b, b_start, b_end, row):
    for j in range(b_end - b_start + 1):
        row[j] = j
    for i in range(a_end - a_start):
        diagonal, row[0] = row[0], i + 1
        for j in range(b_end - b_start):
            replaced = diagonal + (a[a_start + i] != b[b_start + j])
            diagonal = row[j + 1]
            row[j + 1] = min(replaced, row[j] + 1, diagonal + 1)
    return row[b_end - b_start]


_distance = numba.njit(nogil=True)(_edit_distance)


@no_type_check
def _match_candidates(student, teacher, student_side, teacher_side, threshold, work, student_for, teacher_for):
    s_codes, s_bounds, s_bags, s_open = student_side
    t_codes, t_bounds, t_bags, t_open = teacher_side
    for place in range(len(student)):
        s_best = np.full(student.shape[1], threshold)
        for k in range(teacher.shape[1]):
            t = teacher[place, k]
            if not t_open[t]:
                continue
            t_best, t_length = threshold, t_bounds[t + 1] - t_bounds[t]
            for other in range(student.shape[1]):
                s = student[place, other]
                if not s_open[s]:
                    continue
                s_length = s_bounds[s + 1] - s_bounds[s]
                total = max(s_length + t_length, 1)
                # Each of these numbers is a lower bound of the edit distance.
                least = max(
                    abs(s_length - t_length),
                    np.int64(count_bits(s_bags[s] & ~t_bags[t])),
                    np.int64(count_bits(t_bags[t] & ~s_bags[s])),
                )
                if least / total >= max(t_best, s_best[other]):
                    continue
                distance = _distance(s_codes, s_bounds[s], s_bounds[s + 1], t_codes, t_bounds[t], t_bounds[t + 1], work)
                ratio = distance / total
                if ratio < t_best:
                    t_best, student_for[place, k] = ratio, s
                if ratio < s_best[other]:
                    s_best[other], teacher_for[place, other] = ratio, t


_match = numba.njit(nogil=True)(_match_candidates)
