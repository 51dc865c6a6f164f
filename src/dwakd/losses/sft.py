"""Supervised fine-tuning: the cross-entropy of the response, and the baseline of everything else."""

from typing import ClassVar

from torch import Tensor

from dwakd.batch import LossOutput, ModelSide
from dwakd.kernels.head_loss import CrossEntropy, head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, head_rows, reduce_terms
from dwakd.losses.sides import require_side


class SftLoss(DistillationLoss):
    """L = - sum_i log p^s_i(x_i) / S.

    The teacher, if there is one, is ignored. Term: `ce`.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce",)
    needs_teacher: ClassVar[bool] = False

    def forward(
        self,
        student: ModelSide,
        teacher: ModelSide | None = None,
        *,
        num_tokens: Tensor | float | None = None,
        teacher_scale: TeacherScale | None = None,
    ) -> LossOutput:
        require_side(student, "student")
        output = head_loss([head_rows(student)], CrossEntropy(student.target_ids))
        return reduce_terms(
            output.terms, {}, len(student.target_ids) if num_tokens is None else num_tokens, total=output.loss
        )
