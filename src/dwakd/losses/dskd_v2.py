"""DSKDv2: DSKD over exactly aligned tokens, with projectors initialised from the heads (arXiv 2504.11426)."""

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
    """Project the hidden states of exactly aligned tokens into the other model's space and distil there.

        L = (1 - r) CE + r (CE^{t->s} + KD^stu + KD^tea)

    The last three terms include a student token if a teacher token covers the same bytes of the response and the token that
    the teacher predicts there exists in the student's vocabulary. The label in CE^{t->s} is that prediction instead of the
    target. `exact_spaces` defines the terms and `HeadMaps` the projectors: t2s is initialised with a pseudo-inverse that
    preserves the logits of shared tokens and is then trained; s2t is computed from the student's head at each call.

    Gradient: CE^{t->s} trains only t2s. KD^stu trains only the student. KD^tea trains the student through its hidden
    states. The student's head receives gradient only through the student's own logits.

    Args:
        pair: vocabularies and heads of the two models.
        kd_rate: r, the weight of the three distillation terms. The published scripts use 0.5.
        temperature: divides the logits of both models in both divergences. There is no tau^2 factor. The published scripts
            use 2.0.
        divergence: D, the divergence in both spaces.
        skew: lambda of the skewed divergences.
        agreement_mask: whether KD^stu includes only tokens where the projected teacher predicts the same token as the
            teacher itself.

    Raises:
        ValueError: an option is out of range, the divergence is unknown, or the vocabularies share no token.

    References:
        Zhang et al. 2025. Official code: songmzhang/DSKDv2. We differ where its result depends on the batch or the
        tokenizer. It takes means over a micro-batch; we take the mean over each example, weighted by the student tokens of
        the example, so that gradient accumulation and ranks do not change the loss. It compares tokens as strings without
        space marks; we compare the bytes that they cover. If the student has no token for the teacher's prediction, we
        leave the token out; there it becomes the unknown token, which is the end-of-text token in GPT-2. Its agreement
        threshold is left out, since no token exceeds the default of 1.
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
