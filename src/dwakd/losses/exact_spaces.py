"""Token-level terms over exactly aligned tokens, shared by DSKDv2 and DWA-KDv2."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dwakd.align.offsets import exact_rows, sum_by_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import HeadRows, WithPrediction, head_loss, student_space, teacher_space
from dwakd.losses.base import Projection, Terms, head_rows, projected_rows
from dwakd.losses.divergences import Divergence
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.record import record
from dwakd.losses.sides import example_ids
from dwakd.losses.weights import certainty, rescale


class ExactSpaces(NamedTuple):
    """Result of `exact_spaces`: the terms, and tensors that the Soft-DTW terms reuse.

    Args:
        terms: `ce`, `t2s_ce`, `kd_student` and `kd_teacher`.
        teacher_hidden: all teacher states projected into the student's space. They carry gradient to t2s.
        partners: for each student token, the teacher token in the packed batch that covers the same bytes, or -1.
    """

    terms: Terms
    teacher_hidden: Float[Tensor, "t_tokens s_hidden"]
    partners: Int[Tensor, " s_tokens"]


def exact_spaces(
    student: ModelSide,
    teacher: ModelSide,
    maps: HeadMaps,
    *,
    divergence: Divergence,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    agreement_mask: bool = True,
    entropy_weights: bool = False,
    gate: bool = False,
    teacher_weights: bool = False,
) -> ExactSpaces:
    """Compute the cross-entropy and the three distillation terms of DSKDv2.

    A student token i is included if a teacher token j covers the same bytes and the teacher's prediction argmax p^t_j exists in
    the student's vocabulary. p^{t->s}_i comes from t2s h^t_j and p^{s->t}_j from s2t h^s_i:

        t2s_ce     = mean of -log p^{t->s}_i(argmax p^t_j)            trains t2s
        kd_student = mean of D(p^{t->s}_i || p^s_i)                   trains the student; p^{t->s} is a constant
        kd_teacher = mean of D(p^t_j || p^{s->t}_j)                   trains the student through h^s

    Each mean is over the included tokens of an example, which is then weighted by its number of student tokens. An example
    without included tokens adds 0.

    `agreement_mask` restricts `kd_student` to tokens where argmax p^{t->s}_i is the teacher's prediction. `entropy_weights` and
    `gate` weigh `kd_student` by H(p^s_i) and by max_v p^{t->s}_i(v), and `teacher_weights` weighs `kd_teacher` by
    1 - H(p^t_j) / log V_t. `divergence` is D of log-probabilities (target, learned) at the temperature.
    """
    maps.require_fit(student, teacher)
    lengths = student.lengths
    partners = exact_rows(student.byte_ends, lengths, teacher.byte_ends, teacher.lengths)
    # Only aligned tokens go through the teacher's large head. Selecting them waits for the device.
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
    found = in_teacher.statistics  # there are no statistics if no token is aligned
    labels = torch.full_like(partners, -1)
    labels[aligned] = maps.student_tokens[found.get("prediction", partners[aligned])]
    counted, sure = labels >= 0, None
    if teacher_weights:
        sure = torch.zeros_like(labels, dtype=in_teacher.loss.dtype)
        sure[aligned] = certainty(found.get("entropy", in_teacher.loss), head.num_possible)
    teacher_weight = _mean_weights(counted, lengths, in_teacher.loss.dtype, sure)
    record(paired_teacher_weight=teacher_weight)
    kd_teacher = (teacher_weight[aligned] * in_teacher.loss).sum()

    def weigh(statistics: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        counted = statistics["projected_weight"] > 0
        kept = counted & statistics["right"] if agreement_mask else counted
        factors = [statistics[name] for name, used in (("entropy", entropy_weights), ("gate", gate)) if used]
        weights = _mean_weights(kept, lengths, statistics["gate"].dtype, *factors)
        record(student_entropy=statistics["entropy"], gate=statistics["gate"], student_weight=weights)
        return weights

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
            projected_targets=labels.where(counted, student.target_ids),  # weight 0, but never a forbidden token
            projected_weights=_mean_weights(counted, lengths, in_teacher.loss.dtype),
            token_weights=teacher.gate_weights,
        ),
    )
    terms = Terms({**in_student.terms, "kd_teacher": kd_teacher}, in_student.loss, {"kd_teacher": kd_weight})
    return ExactSpaces(terms, teacher_hidden, partners)


def projected_partners(student: ModelSide, teacher: ModelSide, maps: HeadMaps) -> Projection:
    """Project the aligned teacher state for each student token."""
    maps.require_fit(student, teacher)
    partners = exact_rows(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
    rows = teacher.hidden.detach()[partners.clamp_min(0)].to(maps.t2s.weight.dtype)
    return Projection(maps.t2s(rows), partners >= 0)


def _mean_weights(
    kept: Bool[Tensor, " tokens"], lengths: Int[Tensor, " batch"], dtype: torch.dtype, *factors: Tensor | None
) -> Float[Tensor, " tokens"]:
    """Weights proportional to the product of the factors, 0 for tokens not kept, that sum to each example's tokens."""
    weights = kept.to(dtype)
    for factor in factors:
        weights = weights if factor is None else weights * factor
    return rescale(weights, lengths)
