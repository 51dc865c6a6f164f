"""DWA-KD: dual-space entropy weights and banded Soft-DTW alignment (arXiv 2602.21669)."""

import logging
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import HeadLoss, head_loss, student_space, teacher_space
from dwakd.losses.alignment import DTW_TERMS, DwaOptions, dtw_weights, sequence_terms
from dwakd.losses.attention import CrossModelAttention
from dwakd.losses.band import Band
from dwakd.losses.base import DistillationLoss, Projection, Terms, constant_rows, head_rows, projected_rows
from dwakd.losses.crossing import CrossingOptions, cross, kept_weights
from dwakd.losses.divergences import DivergenceName, divergence
from dwakd.losses.options import Positive, Steps, Weight
from dwakd.losses.pair import Widths
from dwakd.losses.record import record
from dwakd.losses.scale import TeacherScale
from dwakd.losses.weights import student_weights, teacher_weights

logger = logging.getLogger(__name__)


class DwaKdOptions(DwaOptions, CrossingOptions):
    variant_defaults = {  # noqa: RUF012
        "authors": {"weight_normalisation": "entropy_then_gate", "student_divergence": "skewed_reverse_kl"},
        "recommended": {
            "alignment": "bytes",
            "values": "hidden",
            "temperature": 1.0,
            "ce_weight": 0.9,
            "kd_weight": 0.1,
            "dtw_weight": 0.02,
        },
    }
    method: Literal["dwa_kd"] = "dwa_kd"
    alignment: Literal["attention", "causal_attention", "bytes"] = CrossingOptions.model_fields["alignment"]  # type: ignore[assignment]
    student_divergence: DivergenceName = Field(
        "forward_kl", description="Divergence D in the student's space; the teacher's space always uses the forward KL."
    )
    weight_normalisation: Literal["product", "entropy_then_gate"] = Field(
        "product",
        description="product (paper) rescales entropy x gate; entropy_then_gate (published code) rescales the entropy only.",
    )
    teacher_space: bool = Field(True, description="Whether to include KD^tea, the divergence in the teacher's space.")
    gate_warmup_steps: Steps = Field(
        0, description="Optimiser steps over which the gate rises from 0; requires entropy_then_gate."
    )
    band_entropy: Weight = Field(
        2.0, description="Additional half-width of the band, in tokens for each nat of the attention's entropy."
    )
    gamma_end: Positive | None = Field(None, description="If set, gamma changes linearly to this value.")
    gamma_steps: Steps = Field(0, description="Number of optimiser steps over which gamma changes.")
    variant: Literal["paper", "authors", "recommended"] = Field(
        "paper",
        description="Set of defaults. authors has choices of the published code: weight_normalisation entropy_then_gate, "
        "skewed reverse KL and band centres counted from 0. In recommended, the projected teacher cannot read the label: "
        "alignment bytes, values hidden, temperature 1, ce_weight 0.9, kd_weight 0.1 and dtw_weight 0.02.",
    )

    @model_validator(mode="after")
    def _check_schedules(self) -> "DwaKdOptions":
        if self.gate_warmup_steps and self.weight_normalisation == "product":
            raise ValueError("gate_warmup_steps requires weight_normalisation=entropy_then_gate")
        if self.gate_warmup_steps and not self.gate:
            raise ValueError("gate_warmup_steps requires gate=true")
        if self.gamma_end is not None and not self.gamma_steps:
            raise ValueError("gamma_end requires gamma_steps of at least 1")
        if self.gamma_steps and self.gamma_end is None:
            raise ValueError("gamma_steps requires gamma_end")
        return self


class DwaKdLoss(DistillationLoss[DwaKdOptions]):
    """DSKD with weights from both models' uncertainty, plus banded Soft-DTW between the two token sequences.

        L = ce_weight CE + kd_weight (CE^{t->s} + KD^stu + KD^tea) + dtw_weight (nDTW(h^s, P h^t) + nDTW(e^s, P e^t))
        KD^stu = sum_i w_i D(p^{t->s}_i || p^s_i)        KD^tea = sum_j w_j KL(p^t_j || p^{s->t}_j)

    w_i is large where the student is uncertain and the projected teacher confident, w_j where the teacher is confident. nDTW
    is the Soft-DTW divergence between hidden states h and between target embeddings e. Cosine costs outside a band around
    the alignment get a penalty. The paper does not state the three weights and gamma; the defaults are those of its code.

    Gradient: the student's hidden states, its head through its own logits only, and its embeddings through nDTW.

    References:
        Vu et al. 2026, equations 1 to 25. Schedules count finished steps, one fewer than in the published code.
    """

    options_type = DwaKdOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher", *DTW_TERMS)
    given_terms = ("ce", "t2s_ce")
    step: Tensor

    def __init__(self, *, widths: Widths, **values: Any) -> None:
        super().__init__(**values)
        options = self.options
        if options.variant == "authors":
            logger.warning("variant=authors uses response positions only, unlike the published code")
        self.divergence = divergence(options.student_divergence, options.skew)
        self.projectors = options.projectors(widths, with_embedding=options.aligns_embedding)
        if not options.teacher_space:
            self.projectors.s2t.requires_grad_(False)  # nothing trains it, which DDP refuses
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self._step = 0  # the same number, which can be read without waiting for the device
        self.register_load_state_dict_post_hook(_read_step)  # type: ignore[no-untyped-call]

    def set_step(self, step: int) -> None:
        self._step = step
        self.step.fill_(step)

    @property
    def gamma(self) -> float:
        """Temperature of the soft minimum at the current optimiser step."""
        start, end, steps = self.options.gamma, self.options.gamma_end, self.options.gamma_steps
        return start if end is None else start + (end - start) * min(self._step / steps, 1.0)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        crossed = cross(self.options, student, teacher, self.projectors, scale)
        in_student = self._student_space(student, crossed, teacher.gate_weights, ce_weight)
        alignment = self._alignment(student, teacher, crossed)
        sums, weights = in_student.terms | alignment, dtw_weights(self.options, alignment)
        if self.options.teacher_space:
            sums["kd_teacher"] = self._teacher_space(teacher, crossed)
            weights["kd_teacher"] = self.options.kd_weight
        return Terms(sums, in_student.loss, weights)

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Projection:
        crossed = cross(self.options, student, teacher, self.projectors, teacher_scale)
        return Projection(crossed.t2s_hidden, crossed.student_kept)

    def _student_space(
        self, student: ModelSide, crossed: CrossModelAttention, gate_weights: Tensor | None, ce_weight: float
    ) -> HeadLoss:
        """Compute `ce`, `t2s_ce` and `kd_student` (equations 7 and 11 to 13)."""
        options = self.options
        weighted = options.entropy_weights or options.gate
        space = student_space(self.divergence)(
            student.target_ids,
            options.temperature,
            {
                "ce": ce_weight,
                "t2s_ce": 0.0 if student.sampled else options.kd_weight,
                "kd_student": options.kd_weight,
            },
            divergence=self.divergence,
            weigh=self._student_weights if weighted else None,
            whole_examples=weighted,
            projected_weights=crossed.student_kept,
            token_weights=kept_weights(crossed.student_kept, gate_weights),
        )
        return head_loss([head_rows(student), projected_rows(crossed.t2s_hidden, student)], space)

    def _student_weights(self, statistics: dict[str, Tensor], lengths: Tensor) -> Tensor:
        options, kept = self.options, statistics["projected_weight"]
        gate = statistics["gate"]
        if options.gate_warmup_steps:
            gate = gate * (self.step / options.gate_warmup_steps).clamp(max=1.0)
        weights = student_weights(
            statistics["entropy"],
            gate,
            lengths,
            use_entropy=options.entropy_weights,
            use_gate=options.gate,
            normalise=options.weight_normalisation,
            kept=kept,
        )
        record(student_entropy=statistics["entropy"], gate=gate, student_weight=weights)
        return weights

    def _teacher_space(self, teacher: ModelSide, crossed: CrossModelAttention) -> Tensor:
        """Compute `kd_teacher` (equations 8, 14, 15). The head is constant, so weights can be applied after `head_loss`."""
        rows = [projected_rows(crossed.s2t_hidden, teacher), constant_rows(teacher)]
        space = teacher_space(self.options.temperature)
        if not self.options.teacher_weights and crossed.teacher_kept is None:
            return head_loss(rows, space).loss
        output, weights = head_loss(rows, space, by_row=True), crossed.teacher_kept
        if self.options.teacher_weights:
            entropy = output.statistics["entropy"]
            weights = teacher_weights(entropy, teacher.head.num_possible, teacher.lengths, weights)
            record(teacher_entropy=entropy, teacher_weight=weights)
        assert weights is not None
        return (weights * output.loss).sum()

    def _alignment(self, student: ModelSide, teacher: ModelSide, crossed: CrossModelAttention) -> dict[str, Tensor]:
        """Compute the two Soft-DTW terms (equations 17 to 24) of the raw, projected teacher vectors."""
        options, dtype = self.options, self.projectors.t2s.weight.dtype
        hidden = embedding = None
        if options.aligns_hidden:
            hidden = self.projectors.t2s(teacher.hidden.detach().to(dtype))
        if options.aligns_embedding:
            embedding = self.projectors.embedding_t2s(teacher.target_embeddings.detach().to(dtype))
        band = None
        if options.band and options.dtw_weight > 0 and crossed.focus is not None:
            band = Band.around(
                crossed.focus,
                student.lengths,
                teacher.lengths,
                base=options.band_base,
                entropy_factor=options.band_entropy,
                blend=options.band_blend,
                penalty=options.band_penalty,
                first_index=int(options.variant != "authors"),
            )
        return sequence_terms(options, (student, teacher), hidden, embedding, gamma=self.gamma, band=band)


def _read_step(loss: DwaKdLoss, keys: Any) -> None:
    """Set the number of finished steps after a checkpoint was loaded."""
    if not loss.step.is_meta:
        loss.set_step(int(loss.step))
