"""SFT: supervised fine-tuning with the cross-entropy of the response. The baseline of all other methods."""

from typing import Any, ClassVar, Literal

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import CrossEntropy, head_loss
from dwakd.losses.base import DistillationLoss, Terms, head_rows
from dwakd.losses.options import MethodOptions


class SftOptions(MethodOptions):
    needs_teacher = False
    method: Literal["sft"] = "sft"

    @property
    def supports_sampled(self) -> bool:
        return False


class SftLoss(DistillationLoss[SftOptions]):
    """Fine-tune the student on the response, without a teacher.

        L = - sum_i log p^s_i(x_i) / S

    x_i are the S response tokens and p^s_i is the student's distribution at token i. A teacher is ignored.
    """

    options_type = SftOptions
    terms: ClassVar[tuple[str, ...]] = ("ce",)

    def compute(self, student: ModelSide, teacher: Any, scale: Any, ce_weight: float) -> Terms:
        return Terms.of(head_loss([head_rows(student)], CrossEntropy(student.target_ids, ce_weight)))
