"""DSKD: distil in the student's and in the teacher's space, for any two tokenizers (arXiv 2406.17328)."""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import head_loss, student_space, teacher_space
from dwakd.losses.base import DistillationLoss, Projection, Terms, constant_rows, head_rows, projected_rows
from dwakd.losses.crossing import CrossingOptions, cross, kept_weights
from dwakd.losses.divergences import DivergenceName, divergence
from dwakd.losses.options import Rate, Skew, Softening
from dwakd.losses.pair import Widths
from dwakd.losses.record import record
from dwakd.losses.scale import TeacherScale


class DskdOptions(CrossingOptions):
    method: Literal["dskd"] = "dskd"
    kd_rate: Rate = Field(0.5, description="Weight r of the three distillation terms. The paper's scripts use 0.5.")
    temperature: Softening = 2.0
    student_divergence: DivergenceName = Field(
        "forward_kl", description="Divergence D in the student's space. The teacher's space always uses the forward KL."
    )
    skew: Skew = 0.1
    accuracy_mask: bool | None = Field(
        None,
        description="Whether KD^stu includes only tokens that the projected teacher predicts correctly; in responses that the "
        "student sampled it includes all. By default this is true unless alignment is position, as in the published code; "
        "the paper does not mention the mask.",
    )

    @property
    def needs_same_vocabulary(self) -> bool:
        return self.alignment == "position"

    @property
    def uses_accuracy_mask(self) -> bool:
        return self.alignment != "position" if self.accuracy_mask is None else self.accuracy_mask


class DskdLoss(DistillationLoss[DskdOptions]):
    """Project each model's hidden states into the other's space and distil through the head of that space.

        L = (1 - r) CE + r (CE^{t->s} + KD^stu + KD^tea)
        KD^stu = sum_i [argmax p^{t->s}_i = x_i] D(p^{t->s}_i || p^s_i)        in the student's space
        KD^tea = sum_j KL(p^t_j || p^{s->t}_j)                                 in the teacher's space

    p^{t->s} is the student's head applied to projected teacher states, and p^{s->t} is the teacher's head applied to
    projected student states. CE^{t->s} is the cross-entropy of p^{t->s}.

    r is the option `kd_rate`, and the option `alignment` determines which tokens of the two models are aligned. With
    position, a state is projected at its own position, which requires models with the same tokenizer. The other
    alignments work for any two tokenizers.

    Gradient: CE^{t->s} trains only the maps `query` and `t2s`. KD^stu trains only the student. KD^tea trains the student,
    `s2t` and `query`. The student's head receives gradient only through the student's own logits.

    References:
        Zhang et al. 2024, equations 8 to 13. Official code: songmzhang/DSKD. Its standard deviations in N(.) include prompt
        and padding positions; ours include response positions only.
    """

    options_type = DskdOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher")
    given_terms = ("ce", "t2s_ce")

    def __init__(self, *, widths: Widths, **options: Any) -> None:
        super().__init__(**options)
        self.divergence = divergence(self.options.student_divergence, self.options.skew)
        self.projectors = self.options.projectors(widths, with_embedding=False)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        crossed = cross(self.options, student, teacher, self.projectors, scale)
        rate, temperature = self.options.kd_rate, self.options.temperature
        space = student_space(self.divergence)(
            student.target_ids,
            temperature,
            {"ce": ce_weight, "t2s_ce": 0.0 if student.sampled else rate, "kd_student": rate},
            divergence=self.divergence,
            weigh=accuracy_mask if self.options.uses_accuracy_mask and not student.sampled else None,
            projected_weights=crossed.student_kept,
            token_weights=kept_weights(crossed.student_kept, teacher.gate_weights),
        )
        in_student = head_loss([head_rows(student), projected_rows(crossed.t2s_hidden, student)], space)
        rows = [projected_rows(crossed.s2t_hidden, teacher), constant_rows(teacher)]
        if crossed.teacher_kept is None:
            kd_teacher = head_loss(rows, teacher_space(temperature)).loss
        else:
            kd_teacher = (head_loss(rows, teacher_space(temperature), by_row=True).loss * crossed.teacher_kept).sum()
        return Terms(in_student.terms | {"kd_teacher": kd_teacher}, in_student.loss, {"kd_teacher": rate})

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Projection:
        crossed = cross(self.options, student, teacher, self.projectors, teacher_scale)
        return Projection(crossed.t2s_hidden, crossed.student_kept)


def accuracy_mask(statistics: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
    """Return weight 1 for tokens where the projected teacher's most probable token is the target, 0 for the others."""
    weights = statistics["right"].to(statistics["gate"].dtype)
    record(student_entropy=statistics["entropy"], gate=statistics["gate"], student_weight=weights)
    return weights
