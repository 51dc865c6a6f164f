"""SFT: supervised fine-tuning with the cross-entropy of the response. The baseline of all other methods."""

from typing import ClassVar, Literal

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import CrossEntropy, head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, Terms, head_rows
from dwakd.losses.options import MethodOptions


class SftOptions(MethodOptions):
    needs_teacher = False
    method: Literal["sft"] = "sft"


class SftLoss(DistillationLoss[SftOptions]):
    """Fine-tune the student on the response, without a teacher.

        L = - sum_i log p^s_i(x_i) / S

    x_i are the S response tokens and p^s_i is the student's distribution at token i. A teacher is ignored.
    """

    options_type = SftOptions
    terms: ClassVar[tuple[str, ...]] = ("ce",)

    def compute(self, student: ModelSide, teacher: ModelSide | None, scale: TeacherScale | None) -> Terms:
        return Terms.of(head_loss([head_rows(student)], CrossEntropy(student.target_ids)))
