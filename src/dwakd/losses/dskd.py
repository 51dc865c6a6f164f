"""DSKD: knowledge distillation in both models' spaces, across vocabularies or within one (arXiv 2406.17328)."""

from typing import ClassVar

from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import head_loss, student_space, teacher_space
from dwakd.losses.attention import TeacherScale, cross_model_attention
from dwakd.losses.base import (
    TEMPERATURES,
    DistillationLoss,
    Terms,
    check_range,
    constant_rows,
    head_rows,
    projected_rows,
)
from dwakd.losses.divergences import divergence
from dwakd.losses.projectors import Projectors, Widths


class DskdLoss(DistillationLoss):
    """L = (1 - r) CE + r (CE^{t->s} + KD^stu + KD^tea).

    KD^stu = sum_i [argmax p^{t->s}_i = x_i] D(p^{t->s}_i || p^s_i) and KD^tea = sum_j KL(p^t_j || p^{s->t}_j).

    With attention, h^{t->s} and h^{s->t} are what cross-model attention gathers from the other's rows, for any two
    tokenizers. Without, they are the other's row at the same place, through t2s and s2t alone: for one tokenizer.

    Gradient: CE^{t->s} trains query and t2s only; the student-space divergence moves the student only; the
    teacher-space divergence moves the student, s2t and query. Neither head receives gradient except the student's own
    through its own logits.

    Args:
        widths: of the two models.
        attention: off for models of one tokenizer. There is no query then.
        kd_rate: r; the paper's scripts use 0.5.
        temperature: softens both sides of both divergences; no tau^2 factor. The paper uses 2.0.
        student_divergence: D; the teacher space always uses forward KL.
        skew: lambda of the skewed divergences.
        accuracy_mask: keep student-space KD only where the projected teacher is right; if not given, as in the
            published code: with attention, and not without. Absent from the equations.

    Raises:
        ValueError: an option out of range or an unknown divergence; in the forward pass without attention, sides of
            different rows.

    References:
        Zhang et al. 2024, equations 8 to 13. Official code: songmzhang/DSKD, whose standard deviations include prompt
        and padding positions; ours are those of response positions (DWA-KD specification, section 5).
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher")
    needs_widths: ClassVar[bool] = True

    def __init__(
        self,
        *,
        widths: Widths,
        attention: bool = True,
        kd_rate: float = 0.5,
        temperature: float = 2.0,
        student_divergence: str = "forward_kl",
        skew: float = 0.1,
        accuracy_mask: bool | None = None,
    ) -> None:
        super().__init__()
        check_range(kd_rate=(kd_rate, 0, 1), temperature=(temperature, *TEMPERATURES))
        self.kd_rate = kd_rate
        self.temperature = temperature
        self.attention = attention
        self.needs_same_vocabulary = not attention
        self.accuracy_mask = attention if accuracy_mask is None else accuracy_mask
        self.divergence = divergence(student_divergence, skew)
        self.projectors = Projectors(widths, with_embedding=False, with_query=attention)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        t2s_hidden, s2t_hidden = self._crossed(student, teacher, scale)
        rate = self.kd_rate
        space = student_space(self.divergence)(
            student.target_ids,
            self.temperature,
            {"ce": 1 - rate, "t2s_ce": rate, "kd_student": rate},
            divergence=self.divergence,
            weigh=accuracy_mask if self.accuracy_mask else None,
            trust=teacher.trust,
        )
        in_student = head_loss([head_rows(student), projected_rows(t2s_hidden, student)], space)
        in_teacher = head_loss(
            [projected_rows(s2t_hidden, teacher), constant_rows(teacher)], teacher_space(self.temperature)
        )
        return Terms(in_student.terms | {"kd_teacher": in_teacher.loss}, in_student.loss, {"kd_teacher": rate})

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Tensor:
        return self._crossed(student, teacher, teacher_scale)[0]

    def _crossed(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> tuple[Tensor, Tensor]:
        """h^{t->s} and h^{s->t}."""
        if self.attention:
            crossed = cross_model_attention(student, teacher, self.projectors, scale)
            return crossed.t2s_hidden, crossed.s2t_hidden
        self.projectors.require_fit(student, teacher)
        dtype = self.projectors.t2s.weight.dtype
        return self.projectors.t2s(teacher.hidden.detach().to(dtype)), self.projectors.s2t(student.hidden.to(dtype))


def accuracy_mask(statistics: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
    """Weight 1 where the projected teacher's most probable token is the target, else 0."""
    return statistics["right"].to(statistics["gate"].dtype)
