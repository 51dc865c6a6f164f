"""Several teachers: one loss per teacher, weighted for each token by the teachers' confidence."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide
from dwakd.errors import UserError
from dwakd.kernels.head_loss import Chunk, Criterion, head_loss
from dwakd.losses.base import DistillationLoss, projected_rows
from dwakd.losses.options import LARGEST, Temperature
from dwakd.losses.scale import TeacherScale
from dwakd.validation import Options

Gate = Literal["confidence", "weights"]


class _Gate(Options):
    teacher_gate: Gate
    teacher_gate_temperature: Temperature


class SeveralTeachers(nn.Module):
    """Combine the losses of one method for several teachers.

        L = sum_k a_k L_k

    The mixture weights a_k sum to 1. With the gate "confidence", the student-space divergence of teacher k at token i has the
    gate weight r_{k,i} instead of a_k. This is a softmax over the projected teachers' largest probabilities, with the mixture
    weights as prior:

        r_{k,i} = a_k exp(g_{k,i} / T) / sum_l a_l exp(g_{l,i} / T),    g_{k,i} = max_v p^{t_k->s}_i(v)

    The softmax includes only teachers with a token that is aligned with student token i. If there is none, the gate weights are
    the mixture weights, and the student-space divergence leaves the token out.

    Gate weights are constants. They multiply the method's own token weights after these have been rescaled. All other terms
    keep the mixture weights, so that the maps of a teacher with low gate weights are still trained. A method without a
    projection into the student's space (see `DistillationLoss.projected`) always uses the mixture weights.

    Args:
        losses: one loss per teacher, each with its own maps.
        weights: mixture weight of each teacher, above 0. They are rescaled to sum to 1. Default: equal weights.
        gate: "confidence", or "weights" for the plain weighted sum.
        temperature: T of the gate. Confidences lie between 0 and 1, so at T = 1 no weight changes by more than a factor e.

    Raises:
        UserError: the numbers of weights and losses differ, or an option is unknown or out of range.

    References:
        The DWA-KD paper mentions several teachers as future work. This gate is ours.
    """

    def __init__(
        self,
        losses: Sequence[DistillationLoss[Any]],
        weights: Sequence[float] | None = None,
        *,
        gate: str = "confidence",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            raise UserError(
                f"teacher_weights must have one weight for each of the {len(losses)} teachers, got {len(weights)}"
            )
        for weight in weights:
            if not 1 / LARGEST <= weight <= LARGEST:
                raise UserError(f"teacher_weights must be above 0, from {1 / LARGEST:g} to {LARGEST:g}, got {weight!r}")
        _Gate(teacher_gate=gate, teacher_gate_temperature=temperature)  # type: ignore[arg-type]
        self.losses = nn.ModuleList(losses)
        self.shares = [weight / sum(weights) for weight in weights]
        self.gate, self.temperature = gate, temperature
        self.needs_attention = any(loss.needs_attention for loss in losses)
        self.terms = losses[0].terms

    def set_step(self, step: int) -> None:
        """Set the number of finished optimiser steps for all losses."""
        for loss in self.losses:
            loss.set_step(step)  # type: ignore[operator]

    def forward(
        self,
        student: ModelSide,
        teachers: Sequence[ModelSide | None],
        *,
        num_tokens: Tensor | float | None = None,
        teacher_scale: Sequence[TeacherScale] | None = None,
    ) -> LossOutput:
        """Compute the loss of one batch; see `DistillationLoss.forward`, with one side and one scale per teacher.

        If the sides have `places`, each teacher teaches only these examples: L is the sum of the teachers' losses on their
        examples, without weights and gate. The side of a teacher without examples is None.

        Returns:
            The loss and the terms, weighted by the mixture weights. With the gate, the terms `gate_1`, `gate_2`, ... are the
            mean gate weight of each teacher. With `places`, they are the share of tokens that each teacher teaches.
        """
        for what, given in (("teachers", teachers), ("teacher_scale", teacher_scale)):
            if given is not None and len(given) != len(self.losses):
                raise ValueError(f"{what} must have {len(self.losses)} entries, one for each loss, got {len(given)}")
        tokens = len(student.target_ids) if num_tokens is None else num_tokens
        sides = [teacher for teacher in teachers if teacher is not None]
        if len(sides) < len(teachers) or sides[0].places is not None:
            return self._by_example(student, teachers, tokens, teacher_scale or [None] * len(teachers))
        return self._by_token(student, sides, tokens, teacher_scale or [TeacherScale.of(side) for side in sides])

    def _by_example(self, student: ModelSide, teachers: Any, tokens: Any, scales: Any) -> LossOutput:
        """Add the loss of each teacher on its own examples."""
        outputs: list[LossOutput] = []
        total, shares = student.hidden.new_zeros(()), {}
        for k, (loss, teacher, scale) in enumerate(zip(self.losses, teachers, scales, strict=True)):
            own = None if teacher is None else student.select(teacher.places)
            shares[f"gate_{k + 1}"] = total.detach().new_tensor(sum(own.counts) if own else 0.0) / tokens
            if own is not None:
                outputs.append(loss(own, teacher, num_tokens=tokens, teacher_scale=scale))
            else:  # distributed training needs a gradient for every parameter in each step
                total = total + sum(0.0 * parameter.sum() for parameter in loss.parameters())
        terms = {name: torch.stack([output.terms[name] for output in outputs]).sum() for name in outputs[0].terms}
        return LossOutput(total + torch.stack([output.loss for output in outputs]).sum(), terms | shares)

    def _by_token(
        self, student: ModelSide, teachers: Sequence[ModelSide], tokens: Any, scales: Sequence[TeacherScale]
    ) -> LossOutput:
        """Add the losses of all teachers on all examples, with the mixture or gate weights."""
        for loss, teacher in zip(self.losses, teachers, strict=True):
            loss.require_sides(student, teacher)  # type: ignore[operator]
        gates = self._gate_weights(student, teachers, scales)
        outputs: list[LossOutput] = []
        for k, (loss, share) in enumerate(zip(self.losses, self.shares, strict=True)):
            teacher = teachers[k] if gates is None else dataclasses.replace(teachers[k], gate_weights=gates[k] / share)
            outputs.append(loss(student, teacher, num_tokens=tokens, teacher_scale=scales[k]))
        total = self._weighted([output.loss for output in outputs])
        terms = {name: self._weighted([output.terms[name] for output in outputs]) for name in outputs[0].terms}
        if gates is not None:
            terms |= {f"gate_{k + 1}": gate.sum() / tokens for k, gate in enumerate(gates)}
        return LossOutput(total, terms)

    def _weighted(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * value for share, value in zip(self.shares, values, strict=True)]).sum(0)

    @torch.no_grad()
    def _gate_weights(
        self, student: ModelSide, teachers: Sequence[ModelSide], scales: Sequence[TeacherScale]
    ) -> Float[Tensor, "teachers tokens"] | None:
        """Compute the gate weight of each teacher at each student token; None if the mixture weights are used."""
        if self.gate == "weights":
            return None
        confidences = []
        for loss, teacher, scale in zip(self.losses, teachers, scales, strict=True):
            projection = loss.projected(student, teacher, scale)  # type: ignore[operator]
            if projection is None:
                return None
            rows = [projected_rows(projection.hidden, student)]
            confidence = head_loss(rows, Confidence(), by_row=True).terms["confidence"]
            if projection.kept is not None:
                confidence = confidence.masked_fill(~projection.kept, -math.inf)
            confidences.append(confidence)
        stacked = torch.stack(confidences) / self.temperature
        stacked = stacked.where((stacked > -math.inf).any(0), 0.0)
        return (stacked + stacked.new_tensor(self.shares).log()[:, None]).softmax(0)


class Confidence(Criterion):
    """Compute the largest probability at each token."""

    def __init__(self) -> None:
        super().__init__({"confidence": 1.0})

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        return {"confidence": logits[0].log_softmax(-1).amax(-1).exp()}
