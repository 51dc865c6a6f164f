"""DWA-KD: dual-space entropy weights and banded Soft-DTW alignment (arXiv 2602.21669)."""

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import HeadLoss, head_loss, student_space, teacher_space
from dwakd.kernels.soft_dtw import IMPLS
from dwakd.losses.alignment import sequence_terms
from dwakd.losses.attention import CrossModelAttention, TeacherScale, band_penalty, cross_model_attention
from dwakd.losses.base import (
    TEMPERATURES,
    DistillationLoss,
    Terms,
    check_at_least,
    check_choice,
    check_range,
    constant_rows,
    head_rows,
    projected_rows,
)
from dwakd.losses.divergences import divergence
from dwakd.losses.projectors import Projectors, Widths
from dwakd.losses.weights import student_weights, teacher_weights

logger = logging.getLogger(__name__)
AUTHORS = {"weight_normalisation": "entropy_then_gate", "student_divergence": "skewed_reverse_kl"}


class DwaKdLoss(DistillationLoss):
    """DSKD with weights from both models' uncertainty, plus banded Soft-DTW between the two token sequences.

        L = ce_weight CE + kd_weight (CE^{t->s} + KD^stu + KD^tea) + dtw_weight (nDTW(h^s, P h^t) + nDTW(e^s, P e^t))
        KD^stu = sum_i w_i D(p^{t->s}_i || p^s_i)        KD^tea = sum_j w_j KL(p^t_j || p^{s->t}_j)

    w_i is large where the student is uncertain and the projected teacher confident, w_j where the teacher is confident. nDTW
    is the Soft-DTW divergence between hidden states h and between target embeddings e. Its cosine costs are raised outside
    a band around the cross-model attention. The paper does not give the three weights and gamma; they are the code's.

    Gradient: the student's hidden states, its head through its own logits only, and its embeddings through nDTW.

    Args:
        widths: widths of the two models.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the three terms of DSKD.
        dtw_weight: weight of the two Soft-DTW terms.
        temperature: divides the logits of both models in both divergences. There is no tau^2 factor.
        student_divergence: D in the student's space. The teacher's space always uses the forward KL.
        skew: lambda of the skewed divergences.
        entropy_weights: whether w_i includes the student's entropy H(p^s_i).
        gate: whether w_i includes the projected teacher's largest probability.
        teacher_weights: whether KD^tea is weighted.
        weight_normalisation: "product" (paper) rescales entropy x gate; "entropy_then_gate" (published code) rescales the
            entropy and then multiplies by the gate.
        gate_warmup_steps: optimiser steps over which the gate rises from 0. Requires "entropy_then_gate".
        dtw_hidden: whether to align the final hidden states.
        dtw_embedding: whether to align the target embeddings.
        band: whether costs outside the band are penalised. Without it, nDTW is plain Soft-DTW.
        band_base: b, half the width of the band, in tokens.
        band_entropy: beta, additional half-width in tokens per nat of the attention's entropy.
        band_blend: alpha, how far the centre of the band follows the attention instead of the diagonal.
        band_penalty: lambda_band, added to each cost outside the band.
        gamma: temperature of the soft minimum.
        gamma_end: if set, gamma changes linearly to this value.
        gamma_steps: number of optimiser steps over which gamma changes.
        compat: "paper", or "authors" for choices of the published code: entropy_then_gate, skewed reverse KL and band centres
            counted from 0. Its use of prompt and padding positions and of bfloat16 costs is not reproduced.
        impl: kernel of Soft-DTW.

    Raises:
        ValueError: an option is out of range, unknown, or contradicts another.

    References:
        Vu et al. 2026, equations 1 to 25. Schedules start one step later than in the published code, at step / steps.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher", "dtw_hidden", "dtw_embedding")
    needs_widths: ClassVar[bool] = True
    step: Tensor

    def __init__(
        self,
        *,
        widths: Widths,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        dtw_weight: float = 0.2,
        temperature: float = 2.0,
        student_divergence: str | None = None,
        skew: float = 0.1,
        entropy_weights: bool = True,
        gate: bool = True,
        teacher_weights: bool = True,
        weight_normalisation: str | None = None,
        gate_warmup_steps: int = 0,
        dtw_hidden: bool = True,
        dtw_embedding: bool = True,
        band: bool = True,
        band_base: float = 5.0,
        band_entropy: float = 2.0,
        band_blend: float = 0.7,
        band_penalty: float = 1.0,
        gamma: float = 2.0,
        gamma_end: float | None = None,
        gamma_steps: int = 0,
        compat: str = "paper",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.gammas = (gamma, gamma if gamma_end is None else gamma_end, gamma_steps)
        check_at_least(0, ce_weight=ce_weight, kd_weight=kd_weight, dtw_weight=dtw_weight, band_penalty=band_penalty)
        check_at_least(0, band_base=band_base, band_entropy=band_entropy, gate_warmup_steps=gate_warmup_steps)
        check_at_least(1e-6, gamma=gamma, gamma_end=self.gammas[1])
        check_at_least(0 if gamma_end is None else 1, gamma_steps=gamma_steps)
        check_range(temperature=(temperature, *TEMPERATURES), band_blend=(band_blend, 0, 1))
        defaults = AUTHORS if compat == "authors" else {}
        normalise = weight_normalisation or defaults.get("weight_normalisation", "product")
        check_choice(impl=(impl, IMPLS), compat=(compat, ("paper", "authors")))
        check_choice(weight_normalisation=(normalise, ("product", "entropy_then_gate")))
        if gate_warmup_steps and normalise == "product":
            raise ValueError("gate_warmup_steps requires weight_normalisation=entropy_then_gate")
        if compat == "authors":
            logger.warning("compat=authors uses response positions only, unlike the published code")
        self.ce_weight, self.kd_weight, self.dtw_weight = ce_weight, kd_weight, dtw_weight
        self.temperature, self.impl = temperature, impl
        self.divergence = divergence(student_divergence or defaults.get("student_divergence", "forward_kl"), skew)
        self.weighting: dict[str, Any] = {"use_entropy": entropy_weights, "use_gate": gate, "normalise": normalise}
        self.teacher_weights, self.gate_warmup_steps = teacher_weights, gate_warmup_steps
        self.dtw_hidden, self.dtw_embedding = dtw_hidden and dtw_weight > 0, dtw_embedding and dtw_weight > 0
        shape = {"base": band_base, "entropy_factor": band_entropy, "blend": band_blend, "penalty": band_penalty}
        self.band: dict[str, Any] | None = {**shape, "first_index": int(compat == "paper")} if band else None
        self.projectors = Projectors(widths, with_embedding=self.dtw_embedding)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def set_step(self, step: int) -> None:
        self.step.fill_(step)

    @property
    def gamma(self) -> float:
        """Temperature of the soft minimum at the current optimiser step."""
        start, end, steps = self.gammas
        return end if steps == 0 else start + (end - start) * min(int(self.step) / steps, 1.0)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        crossed = cross_model_attention(student, teacher, self.projectors, scale)
        in_student = self._student_space(student, crossed, teacher.trust)
        alignment = self._alignment(student, teacher, crossed)
        sums = {**in_student.terms, "kd_teacher": self._teacher_space(teacher, crossed), **alignment}
        weights = {"kd_teacher": self.kd_weight, **dict.fromkeys(alignment, self.dtw_weight)}
        return Terms(sums, in_student.loss, weights)

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Tensor:
        return cross_model_attention(student, teacher, self.projectors, teacher_scale).t2s_hidden

    def _student_space(self, student: ModelSide, crossed: CrossModelAttention, trust: Tensor | None) -> HeadLoss:
        """Compute `ce`, `t2s_ce` and `kd_student` (equations 7 and 11 to 13)."""
        weighted = self.weighting["use_entropy"] or self.weighting["use_gate"]
        space = student_space(self.divergence)(
            student.target_ids,
            self.temperature,
            {"ce": self.ce_weight, "t2s_ce": self.kd_weight, "kd_student": self.kd_weight},
            divergence=self.divergence,
            weigh=self._student_weights if weighted else None,
            whole_examples=weighted,
            trust=trust,
        )
        return head_loss([head_rows(student), projected_rows(crossed.t2s_hidden, student)], space)

    def _student_weights(self, statistics: dict[str, Tensor], lengths: Tensor) -> Tensor:
        gate = statistics["gate"]
        if self.gate_warmup_steps:
            gate = gate * (self.step / self.gate_warmup_steps).clamp(max=1.0)
        return student_weights(statistics["entropy"], gate, lengths, **self.weighting)

    def _teacher_space(self, teacher: ModelSide, crossed: CrossModelAttention) -> Tensor:
        """Compute `kd_teacher` (equations 8, 14, 15). The head is constant, so weights can be applied after `head_loss`."""
        rows = [projected_rows(crossed.s2t_hidden, teacher), constant_rows(teacher)]
        if not self.teacher_weights:
            return head_loss(rows, teacher_space(self.temperature)).loss
        output = head_loss(rows, teacher_space(self.temperature), by_row=True)
        weights = teacher_weights(output.statistics["entropy"], teacher.head.num_possible, teacher.lengths)
        return (weights * output.loss).sum()

    def _alignment(self, student: ModelSide, teacher: ModelSide, crossed: CrossModelAttention) -> dict[str, Tensor]:
        """Compute the two Soft-DTW terms (equations 17 to 24) of the raw, projected teacher vectors in one kernel call."""
        dtype = self.projectors.t2s.weight.dtype
        pairs = {}
        if self.dtw_hidden:
            pairs["dtw_hidden"] = (student.hidden, self.projectors.t2s(teacher.hidden.detach().to(dtype)))
        if self.dtw_embedding:
            projected = self.projectors.embedding_t2s(teacher.target_embeddings.detach().to(dtype))
            pairs["dtw_embedding"] = (student.target_embeddings, projected)
        band = None
        if self.band is not None and pairs:
            band = band_penalty(crossed.weights, student.lengths, teacher.lengths, **self.band)
        return sequence_terms(pairs, student, teacher, gamma=self.gamma, band=band, impl=self.impl)
