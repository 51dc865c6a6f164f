"""Supervised fine-tuning: the cross-entropy of the response, and the baseline of everything else."""

from typing import ClassVar

from torch import Tensor

from dwakd.batch import LossOutput, ModelSide
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, cross_entropy, reduce_terms


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
        log_probs = student.head.logits(student.hidden).log_softmax(-1)
        sums = {"ce": cross_entropy(log_probs, student.target_ids)}
        return reduce_terms(sums, {"ce": 1.0}, len(student.target_ids) if num_tokens is None else num_tokens)
