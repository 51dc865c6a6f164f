"""DSKD: distil in the student's and in the teacher's space, for any two tokenizers (arXiv 2406.17328)."""

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
    """Project each model's hidden states into the other's space and distil through the head of that space.

        L = (1 - r) CE + r (CE^{t->s} + KD^stu + KD^tea)
        KD^stu = sum_i [argmax p^{t->s}_i = x_i] D(p^{t->s}_i || p^s_i)        in the student's space
        KD^tea = sum_j KL(p^t_j || p^{s->t}_j)                                 in the teacher's space

    p^{t->s} is the student's head applied to projected teacher states, and p^{s->t} is the teacher's head applied to
    projected student states. CE^{t->s} is the cross-entropy of p^{t->s}.

    With attention, cross-model attention aligns the two token sequences, which works for any two tokenizers. Without
    attention, a state is projected at its own position, which requires models with the same tokenizer.

    Gradient: CE^{t->s} trains only the maps `query` and `t2s`. KD^stu trains only the student. KD^tea trains the student,
    `s2t` and `query`. The student's head receives gradient only through the student's own logits.

    Args:
        widths: widths of the two models.
        attention: whether to align the tokens by cross-model attention. Set it to false for models with the same
            tokenizer; the map `query` does not exist then.
        kd_rate: r, the weight of the three distillation terms. The paper's scripts use 0.5.
        temperature: divides the logits of both models in both divergences. There is no tau^2 factor. The paper uses 2.0.
        student_divergence: D in the student's space. The teacher's space always uses the forward KL.
        skew: lambda of the skewed divergences.
        accuracy_mask: whether KD^stu includes only tokens that the projected teacher predicts correctly. Default: true with
            attention and false without, as in the published code. The paper's equations do not mention the mask.

    Raises:
        ValueError: an option is out of range or the divergence is unknown; in the forward pass without attention, the sides
            have different numbers of tokens.

    References:
        Zhang et al. 2024, equations 8 to 13. Official code: songmzhang/DSKD. Its standard deviations in N(.) include prompt
        and padding positions; ours include response positions only.
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
        """Project the teacher's states into the student's space and the student's states into the teacher's space."""
        if self.attention:
            crossed = cross_model_attention(student, teacher, self.projectors, scale)
            return crossed.t2s_hidden, crossed.s2t_hidden
        self.projectors.require_fit(student, teacher)
        dtype = self.projectors.t2s.weight.dtype
        return self.projectors.t2s(teacher.hidden.detach().to(dtype)), self.projectors.s2t(student.hidden.to(dtype))


def accuracy_mask(statistics: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
    """Weight 1 for tokens where the projected teacher's most probable token is the target, 0 for the others."""
    return statistics["right"].to(statistics["gate"].dtype)
