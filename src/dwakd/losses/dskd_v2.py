"""DSKDv2: DSKD over exactly aligned tokens, with projectors initialised from the heads (arXiv 2504.11426)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from dwakd.batch import ModelSide
from dwakd.losses.base import DistillationLoss, Projection, Terms
from dwakd.losses.divergences import DivergenceName, divergence
from dwakd.losses.exact_spaces import exact_spaces, projected_partners
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.options import MethodOptions, Rate, Skew, Softening
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale


class DskdV2Options(MethodOptions):
    needs_models = "pair"
    method: Literal["dskd_v2"] = "dskd_v2"
    kd_rate: Rate = Field(0.5, description="Weight r of the three distillation terms. The published scripts use 0.5.")
    temperature: Softening = 2.0
    divergence: DivergenceName = Field("forward_kl", description="Divergence D in both spaces.")
    skew: Skew = 0.1
    agreement_mask: bool = Field(
        True,
        description="Whether KD^stu includes only tokens where the projected teacher predicts what the teacher does.",
    )


class DskdV2Loss(DistillationLoss[DskdV2Options]):
    """Project the hidden states of exactly aligned tokens into the other model's space and distil there.

        L = (1 - r) CE + r (CE^{t->s} + KD^stu + KD^tea)

    r is the option `kd_rate`. The last three terms include a student token if a teacher token covers the same bytes of
    the response and the token that the teacher predicts there exists in the student's vocabulary. The label in
    CE^{t->s} is that prediction instead of the target. `exact_spaces` defines the terms and `HeadMaps` the projectors:
    t2s is initialised with a pseudo-inverse that preserves the logits of shared tokens and is then trained; s2t is
    computed from the student's head at each call.

    Gradient: CE^{t->s} trains only t2s. KD^stu trains only the student. KD^tea trains the student through its hidden
    states. The student's head receives gradient only through the student's own logits.

    References:
        Zhang et al. 2025. Official code: songmzhang/DSKDv2. It takes means over a micro-batch; we take the mean over each
        example, weighted by its student tokens, so that gradient accumulation and ranks do not change the loss. It compares
        tokens as strings without space marks; we compare the bytes that they cover. If the student has no token for the
        teacher's prediction, we leave the position out; the official code uses the unknown token as the label.
    """

    options_type = DskdV2Options
    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher")

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.divergence = divergence(self.options.divergence, self.options.skew)
        self.vocabularies, self.projectors = pair.vocabularies, HeadMaps(pair)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        return exact_spaces(
            student,
            teacher,
            self.projectors,
            divergence=self.divergence,
            temperature=self.options.temperature,
            ce_weight=ce_weight,
            kd_weight=self.options.kd_rate,
            agreement_mask=self.options.agreement_mask,
        ).terms

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Projection:
        return projected_partners(student, teacher, self.projectors)
