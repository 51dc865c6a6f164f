"""Distillation in both models' spaces over exactly aligned tokens: what DSKDv2 and DWA-KDv2 share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dwakd.align.offsets import exact_rows, sum_by_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import HeadRows, WithPrediction, head_loss, student_space, teacher_space
from dwakd.losses.base import head_rows, projected_rows
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.packing import example_ids
from dwakd.losses.weights import certainty, rescale


@dataclass(frozen=True)
class ExactSpaces:
    """Sums over the batch, and what an alignment of sequences may reuse.

    Args:
        total: weighted sum of `ce`, `t2s_ce` and `kd_student`, with gradient.
        terms: those three without their weight, detached, and `kd_teacher`, with gradient.
        teacher_hidden: every teacher row in the student's space. Gradient: t2s.
        partners: the teacher's row of each student row whose tokens cover the same bytes, or -1.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    teacher_hidden: Float[Tensor, "t_tokens s_hidden"]
    partners: Int[Tensor, " s_tokens"]


def exact_spaces(
    student: ModelSide,
    teacher: ModelSide,
    maps: HeadMaps,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    agreement_mask: bool = True,
    entropy_weights: bool = False,
    gate: bool = False,
    teacher_weights: bool = False,
) -> ExactSpaces:
    """The token-level terms of DSKDv2, each a mean over the tokens it is taken of.

    A student row i counts if it has a partner j, and the teacher's prediction argmax p^t_j is a token of the student's.
    With t2s h^t_j for p^{t->s}_i and s2t h^s_i for p^{s->t}_j:

        t2s_ce     = mean of -log p^{t->s}_i(argmax p^t_j)            trains t2s
        kd_student = mean of D(p^{t->s}_i || p^s_i)                   trains the student; p^{t->s} is a constant
        kd_teacher = mean of D(p^t_j || p^{s->t}_j)                   trains the student through h^s

    A mean is one over each example, which then counts by its number of student tokens. An example without a token to
    take it of adds 0.

    Args:
        student: rows with gradient.
        teacher: rows without.
        maps: t2s and s2t.
        divergence: D of log-probabilities (target, learned), in both spaces.
        temperature: softens both sides of both divergences.
        ce_weight: of `ce`.
        kd_weight: of `t2s_ce` and `kd_student`.
        agreement_mask: `kd_student` counts rows only where argmax p^{t->s}_i is the teacher's prediction.
        entropy_weights: weigh rows of `kd_student` by H(p^s_i) ...
        gate: ... and by max_v p^{t->s}_i(v).
        teacher_weights: weigh rows of `kd_teacher` by 1 - H(p^t_j) / log V_t.
    """
    maps.require_fit(student, teacher)
    lengths = student.lengths
    partners = exact_rows(student.byte_ends, lengths, teacher.byte_ends, teacher.lengths)
    # No row without a partner goes through the teacher's head, the dearer one; it costs a wait for the device.
    aligned = (partners >= 0).nonzero().squeeze(1)

    head = teacher.head.detached()
    pairs = sum_by_group((partners >= 0).long(), example_ids(lengths, len(partners)), len(lengths))
    in_teacher = head_loss(
        [
            HeadRows(maps.s2t(student.hidden[aligned], student.head, teacher.head), head, pairs),
            HeadRows(teacher.hidden.detach()[partners[aligned]], head, pairs),
        ],
        WithPrediction(teacher_space(temperature, divergence), side=1),
        by_row=True,
    )
    found = in_teacher.statistics  # none, where no row has a partner
    labels = torch.full_like(partners, -1)
    labels[aligned] = maps.student_tokens[found.get("prediction", partners[aligned])]
    counted, sure = labels >= 0, None
    if teacher_weights:
        sure = torch.zeros_like(labels, dtype=in_teacher.loss.dtype)
        sure[aligned] = certainty(found.get("entropy", in_teacher.loss), head.num_possible)
    kd_teacher = (_mean_weights(counted, lengths, in_teacher.loss.dtype, sure)[aligned] * in_teacher.loss).sum()

    def weigh(statistics: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        counted = statistics["projected_weight"] > 0
        kept = counted & statistics["right"] if agreement_mask else counted
        factors = [statistics[name] for name, used in (("entropy", entropy_weights), ("gate", gate)) if used]
        return _mean_weights(kept, lengths, statistics["gate"].dtype, *factors)

    teacher_hidden = maps.t2s(teacher.hidden.detach().to(maps.t2s.weight.dtype))
    in_student = head_loss(
        [head_rows(student), projected_rows(teacher_hidden[partners.clamp_min(0)], student)],
        student_space(divergence)(
            student.target_ids,
            temperature,
            {"ce": ce_weight, "t2s_ce": kd_weight, "kd_student": kd_weight},
            divergence=divergence,
            weigh=weigh,
            whole_examples=True,
            projected_targets=labels.where(counted, student.target_ids),  # of weight 0, but never forbidden
            projected_weights=_mean_weights(counted, lengths, in_teacher.loss.dtype),
            trust=teacher.trust,
        ),
    )
    return ExactSpaces(in_student.loss, in_student.terms | {"kd_teacher": kd_teacher}, teacher_hidden, partners)


def projected_partners(student: ModelSide, teacher: ModelSide, maps: HeadMaps) -> Float[Tensor, "s_tokens s_hidden"]:
    """t2s h^t_j at the rows that have a partner j; zero, which predicts what the head's bias does, at the others."""
    maps.require_fit(student, teacher)
    partners = exact_rows(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
    rows = teacher.hidden.detach()[partners.clamp_min(0)].to(maps.t2s.weight.dtype)
    return torch.where(partners[:, None] >= 0, maps.t2s(rows), 0.0)


def _mean_weights(
    kept: Bool[Tensor, " tokens"], lengths: Int[Tensor, " batch"], dtype: torch.dtype, *factors: Tensor | None
) -> Float[Tensor, " tokens"]:
    """Weights of the kept rows that sum to the tokens of each example; equal but for the factors."""
    weights = kept.to(dtype)
    for factor in factors:
        weights = weights if factor is None else weights * factor
    return rescale(weights, lengths)
