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
    check_range,
    constant_rows,
    head_rows,
    projected_rows,
)
from dwakd.losses.divergences import divergence
from dwakd.losses.projectors import Projectors, Widths
from dwakd.losses.weights import student_weights, teacher_weights

logger = logging.getLogger(__name__)
INFINITY = float("inf")
AUTHORS = {"weight_normalisation": "entropy_then_gate", "student_divergence": "skewed_reverse_kl"}


class DwaKdLoss(DistillationLoss):
    """L = ce_weight CE + kd_weight (CE^{t->s} + KD^stu + KD^tea) + dtw_weight (nDTW(h^s, P h^t) + nDTW(e^s, P e^t)).

    KD^stu = sum_i w_i D(p^{t->s}_i || p^s_i) and KD^tea = sum_j w_j KL(p^t_j || p^{s->t}_j), weighted up where the
    student is uncertain and the projected teacher confident. nDTW is the Soft-DTW divergence of cosine costs, its
    cross cost raised outside a band around the cross-model attention. Constants default to the paper's; the three weights
    and gamma, which it doesn't give, to the published code's.

    Gradient: the student's hidden states through CE, KD^stu, KD^tea and nDTW; its head through its own logits only; its
    embeddings through nDTW only (beside the model's own use); never the teacher.

    Args:
        widths: of the two models.
        ce_weight: lambda_CE.
        kd_weight: lambda_W-KD.
        dtw_weight: lambda_DTW.
        temperature: softens both sides of both divergences; no tau^2 factor.
        student_divergence: D; the teacher space always uses forward KL.
        skew: lambda of the skewed divergences.
        entropy_weights: the factor H(p^s_i) of the student's weights.
        gate: the factor max_v p^{t->s}_i(v) of the student's weights.
        teacher_weights: weights of the teacher space; ones when off.
        weight_normalisation: "product" (paper) or "entropy_then_gate" (published code).
        gate_warmup_steps: optimiser steps over which the gate rises from 0; only with "entropy_then_gate", since a
            rescaled product cannot be warmed up. The published code intends 300 and runs with 0.
        dtw_hidden: the pair of final hidden states.
        dtw_embedding: the pair of target embeddings.
        band: whether the cross cost is banded; off gives plain Soft-DTW.
        band_base: b, in tokens.
        band_entropy: beta, tokens per nat.
        band_blend: alpha.
        band_penalty: lambda_band.
        gamma: temperature of the soft minimum.
        gamma_end: if given, gamma moves linearly to it ...
        gamma_steps: ... over this many optimiser steps.
        compat: "paper", or "authors" for the published code's choices where they make sense: entropy_then_gate, skewed
            reverse KL and centres counted from 0. Left out: aligning a prefix of the sequence instead of the response,
            statistics over prompt and padding, and bfloat16 costs.
        impl: kernel of Soft-DTW.

    Raises:
        ValueError: an option out of range, unknown, or in contradiction to another.

    References:
        Vu et al. 2026, equations 1 to 25.
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
        check_range(
            ce_weight=(ce_weight, 0, INFINITY),
            kd_weight=(kd_weight, 0, INFINITY),
            dtw_weight=(dtw_weight, 0, INFINITY),
            temperature=(temperature, *TEMPERATURES),
            gamma=(gamma, 1e-6, INFINITY),
            gamma_end=(gamma if gamma_end is None else gamma_end, 1e-6, INFINITY),
            gamma_steps=(gamma_steps, 0 if gamma_end is None else 1, INFINITY),
            gate_warmup_steps=(gate_warmup_steps, 0, INFINITY),
            band_base=(band_base, 0, INFINITY),
            band_entropy=(band_entropy, 0, INFINITY),
            band_blend=(band_blend, 0, 1),
            band_penalty=(band_penalty, 0, INFINITY),
        )
        if impl not in IMPLS:
            raise ValueError(f"unknown impl {impl!r}; valid ones: {', '.join(IMPLS)}")
        if compat not in ("paper", "authors"):
            raise ValueError(f"unknown compat {compat!r}; valid ones: paper, authors")
        defaults = AUTHORS if compat == "authors" else {}
        normalise = weight_normalisation or defaults.get("weight_normalisation", "product")
        if normalise not in ("product", "entropy_then_gate"):
            raise ValueError(f"unknown weight_normalisation {normalise!r}; valid ones: product, entropy_then_gate")
        if gate_warmup_steps and normalise == "product":
            raise ValueError("gate_warmup_steps needs weight_normalisation entropy_then_gate")
        if compat == "authors":
            logger.warning("compat=authors aligns response positions and takes statistics over them, as the paper does")

        self.ce_weight, self.kd_weight, self.dtw_weight = ce_weight, kd_weight, dtw_weight
        self.temperature = temperature
        self.divergence = divergence(student_divergence or defaults.get("student_divergence", "forward_kl"), skew)
        self.weighting: dict[str, Any] = {"use_entropy": entropy_weights, "use_gate": gate, "normalise": normalise}
        self.teacher_weights = teacher_weights
        self.gate_warmup_steps = gate_warmup_steps
        self.dtw_hidden = dtw_hidden and dtw_weight > 0
        self.dtw_embedding = dtw_embedding and dtw_weight > 0
        self.band: dict[str, Any] | None = None
        if band:
            self.band = {
                "base": band_base,
                "entropy_factor": band_entropy,
                "blend": band_blend,
                "penalty": band_penalty,
                "first_index": 0 if compat == "authors" else 1,
            }
        self.gammas = (gamma, gamma if gamma_end is None else gamma_end, gamma_steps)
        self.impl = impl
        self.projectors = Projectors(widths, with_embedding=self.dtw_embedding)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def set_step(self, step: int) -> None:
        self.step.fill_(step)

    @property
    def gamma(self) -> float:
        """The temperature of the soft minimum at the current optimiser step (`step`, set by the trainer)."""
        start, end, steps = self.gammas
        return end if steps == 0 else start + (end - start) * min(int(self.step) / steps, 1.0)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        crossed = cross_model_attention(student, teacher, self.projectors, scale)
        in_student = self._student_space(student, crossed, teacher.trust)
        alignment = self._alignment(student, teacher, crossed)
        return Terms(
            {**in_student.terms, "kd_teacher": self._teacher_space(teacher, crossed), **alignment},
            in_student.loss,
            {"kd_teacher": self.kd_weight, **dict.fromkeys(alignment, self.dtw_weight)},
        )

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Tensor:
        return cross_model_attention(student, teacher, self.projectors, teacher_scale).t2s_hidden

    def _student_space(self, student: ModelSide, crossed: CrossModelAttention, trust: Tensor | None) -> HeadLoss:
        """Equations 7 and 11 to 13, with both cross-entropies."""
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
        """Equations 8, 14 and 15. The head is a constant, so rows may be weighted after their gradient is known."""
        rows = [projected_rows(crossed.s2t_hidden, teacher), constant_rows(teacher)]
        if not self.teacher_weights:
            return head_loss(rows, teacher_space(self.temperature)).loss
        output = head_loss(rows, teacher_space(self.temperature), by_row=True)
        weights = teacher_weights(output.statistics["entropy"], teacher.head.num_possible, teacher.lengths)
        return (weights * output.loss).sum()

    def _alignment(self, student: ModelSide, teacher: ModelSide, crossed: CrossModelAttention) -> dict[str, Tensor]:
        """Equations 17 to 24: both pairs of sequences in one Soft-DTW call; the raw teacher vectors are projected."""
        dtype = self.projectors.t2s.weight.dtype
        pairs = {}
        if self.dtw_hidden:
            pairs["dtw_hidden"] = (student.hidden, self.projectors.t2s(teacher.hidden.detach().to(dtype)))
        if self.dtw_embedding:
            projected = self.projectors.embedding_t2s(teacher.target_embeddings.detach().to(dtype))
            pairs["dtw_embedding"] = (student.target_embeddings, projected)
        if not pairs:
            return {}
        band = None
        if self.band is not None:
            band = band_penalty(crossed.weights, student.lengths, teacher.lengths, **self.band)
        return sequence_terms(pairs, student, teacher, gamma=self.gamma, band=band, impl=self.impl)
