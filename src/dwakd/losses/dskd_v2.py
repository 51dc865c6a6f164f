"""DSKDv2: distillation in both models' spaces over exactly aligned tokens (arXiv 2504.11426)."""

from typing import ClassVar

from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import TEMPERATURES, DistillationLoss, Terms, check_range
from dwakd.losses.divergences import divergence as named_divergence
from dwakd.losses.exact_spaces import exact_spaces, projected_partners
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.pair import ModelPair


class DskdV2Loss(DistillationLoss):
    """L = (1 - r) CE + r (CE^{t->s} + KD^stu + KD^tea), with exact token alignment.

    A student token counts in the last three if a token of the teacher covers the same bytes and what the teacher
    predicts there is a token of the student's. Its label in CE^{t->s} is that prediction, not the text. See
    `exact_spaces` for the terms and `HeadMaps` for the projectors: t2s starts from a pseudo-inverse that keeps the
    logits of shared tokens, s2t is one computed from the student's head at each call.

    Gradient: CE^{t->s} trains t2s only; the student-space divergence moves the student only; the teacher-space
    divergence moves the student through its hidden states. Neither head receives gradient except the student's own
    through its own logits.

    Args:
        pair: of the two models.
        kd_rate: r; the published scripts use 0.5.
        temperature: softens both sides of both divergences; no tau^2 factor. The published scripts use 2.0.
        divergence: D in both spaces.
        skew: lambda of the skewed divergences.
        agreement_mask: keep student-space KD only where the projected teacher predicts what the teacher predicts.

    Raises:
        ValueError: an option out of range, an unknown divergence, or vocabularies that share no token.

    References:
        Zhang et al. 2025. Official code: songmzhang/DSKDv2. We differ where it depends on the batch or the tokenizer:
        its means are those of a micro-batch, ours of an example, weighted by its student tokens, so that neither
        accumulation nor ranks change them; it compares tokens as strings stripped of space marks, we compare the bytes
        they cover; a prediction that the student has no token for drops out, there it becomes the unknown token (the
        end of the text for GPT-2). Its agreement threshold, 1 by default, which nothing exceeds, is left out.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher")
    needs_pair: ClassVar[bool] = True

    def __init__(
        self,
        *,
        pair: ModelPair,
        kd_rate: float = 0.5,
        temperature: float = 2.0,
        divergence: str = "forward_kl",
        skew: float = 0.1,
        agreement_mask: bool = True,
    ) -> None:
        super().__init__()
        check_range(kd_rate=(kd_rate, 0, 1), temperature=(temperature, *TEMPERATURES))
        self.kd_rate, self.temperature = kd_rate, temperature
        self.agreement_mask = agreement_mask
        self.divergence = named_divergence(divergence, skew)
        self.projectors = HeadMaps(pair)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        spaces = exact_spaces(
            student,
            teacher,
            self.projectors,
            divergence=self.divergence,
            temperature=self.temperature,
            ce_weight=1 - self.kd_rate,
            kd_weight=self.kd_rate,
            agreement_mask=self.agreement_mask,
        )
        return Terms(spaces.terms, spaces.total, {"kd_teacher": self.kd_rate})

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Tensor:
        return projected_partners(student, teacher, self.projectors)
