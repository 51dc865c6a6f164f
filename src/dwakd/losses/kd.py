"""KD: knowledge distillation between models with the same tokenizer, by a divergence at each token."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from dwakd.batch import ModelSide, OutputHead
from dwakd.kernels.head_loss import CrossEntropy, head_loss
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.divergences import DivergenceName, compare_with_teacher, divergence
from dwakd.losses.options import MethodOptions, Rate, Skew, Softening
from dwakd.losses.scale import TeacherScale


class KdOptions(MethodOptions):
    method: Literal["kd"] = "kd"
    kd_rate: Rate = Field(0.5, description="Weight r of the divergence.")
    temperature: Softening = 2.0
    divergence: DivergenceName = Field("forward_kl", description="Divergence D.")
    skew: Skew = 0.1

    @property
    def needs_same_vocabulary(self) -> bool:
        return True


class KdLoss(DistillationLoss[KdOptions]):
    """Train the student to predict the teacher's distribution at each token, for models with the same tokenizer.

        L = (1 - r) CE + r sum_i D(p^t_i || p^s_i)

    r is the option `kd_rate`. The divergence D is over the vocabulary entries that both heads have, because one head
    may be padded with more unused entries than the other. The cross-entropy CE is over all entries of the student's
    head.

    Gradient: the student's hidden states and head, through both terms.

    References:
        Hinton et al. 2015. Divergences: Gu et al. 2024, Ko et al. 2024 (DistiLLM) and Wu et al. 2024 (adaptive KL).
        The defaults are those of songmzhang/DSKD. DistiLLM itself uses temperature 1.
    """

    options_type = KdOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.divergence = divergence(self.options.divergence, self.options.skew)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        rate, temperature = self.options.kd_rate, self.options.temperature
        own, theirs = head_rows(student), constant_rows(teacher)
        common = min(student.head.vocab_size, teacher.head.vocab_size)
        theirs = replace(theirs, head=narrowed(theirs.head, common))
        if student.head.vocab_size == common:
            both = compare_with_teacher(
                [own, theirs], self.divergence, temperature, student.target_ids, ce_weight=ce_weight, kd_weight=rate
            )
            return Terms.of(both)
        ce = head_loss([own], CrossEntropy(student.target_ids, ce_weight))
        sides = [replace(own, head=narrowed(own.head, common)), theirs]
        kd = compare_with_teacher(sides, self.divergence, temperature, kd_weight=rate)
        return Terms(ce.terms | {"kd": kd.terms["kd"]}, ce.loss + kd.loss)


def narrowed(head: OutputHead, size: int) -> OutputHead:
    """Return a head with only the first `size` vocabulary entries."""
    return replace(head, weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])
