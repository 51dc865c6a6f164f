"""Measure how often the projected teacher and the teacher predict the text, which shows whether the projection leaks."""

from typing import Any

import torch
from torch import Tensor

from dwakd.align.offsets import exact_rows
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import CrossEntropy, HeadRows, WithPrediction, head_loss
from dwakd.losses.base import DistillationLoss
from dwakd.losses.scale import TeacherScale


@torch.no_grad()
def count_correct(
    loss: DistillationLoss[Any], student: ModelSide, teacher: ModelSide, scale: TeacherScale
) -> dict[str, Tensor]:
    """Count the tokens that both sides share exactly, and those of them that are predicted correctly.

    A teacher state that has not read the target cannot predict it more often than the teacher does. So an accuracy of the
    projected teacher far above the teacher's shows that the projection reads the label.

    Returns:
        `aligned`, the number of student tokens that cover the same bytes as a teacher token; `t2s` and `teacher`, at how
        many of these the most probable token of the projected teacher (in the student's vocabulary) and of the teacher
        (in its own) is the target. Empty if the loss has no projection (`DistillationLoss.projected`).
    """
    projected = loss.projected(student, teacher, scale)
    if projected is None:
        return {}
    partners = exact_rows(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
    rows = (partners >= 0).nonzero().squeeze(1)
    partners = partners[rows]
    sides = {
        "t2s": (projected.hidden[rows], student.head, student.target_ids[rows]),
        "teacher": (teacher.hidden[partners], teacher.head, teacher.target_ids[partners]),
    }
    counts = {"aligned": torch.tensor(float(len(rows)), device=rows.device)}
    for name, (hidden, head, targets) in sides.items():
        one = HeadRows(hidden, head.detached(), torch.tensor([len(rows)], device=rows.device), (len(rows),))
        output = head_loss([one], WithPrediction(CrossEntropy(targets), 0), by_row=True) if len(rows) else None
        counts[name] = counts["aligned"] * 0 if output is None else (output.statistics["prediction"] == targets).sum()
    return counts
