"""Several teachers: one method for each, and a gate that decides token by token which of them is trusted."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide
from dwakd.errors import UserError
from dwakd.kernels.head_loss import Chunk, Criterion, head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import LARGEST, TEMPERATURES, DistillationLoss, projected_rows

GATES = ("confidence", "weights")


class SeveralTeachers(nn.Module):
    """L = sum_k a_k L_k, the losses of one method against each teacher, whose shares a_k sum to 1.

    With the gate "confidence", the student-space divergence of teacher k at row i counts r_{k,i} instead of a_k:

        r_{k,i} = a_k exp(g_{k,i} / T) / sum_l a_l exp(g_{l,i} / T),    g_{k,i} = max_v p^{t_k->s}_i(v)

    a softmax of the projected teachers' peak probabilities with the shares as its prior. It takes effect after the
    method's own weights and rescaling, so that the shares at a row sum to 1 whatever the methods do. All other
    terms keep the shares: the maps of a teacher that isn't trusted must learn, too. A method that projects no teacher
    into the student's space (`DistillationLoss.projected`) takes the weighted sum alone. Two teachers that are the same
    give the loss of one, if their maps are.

    Gradient: that of each method; the gate is a constant.

    Args:
        losses: one per teacher, each with maps of its own.
        weights: above 0, rescaled to sum to 1; equal ones if not given.
        gate: "confidence" or "weights", the plain weighted sum.
        temperature: T of the gate. Confidences lie between 0 and 1, so that at 1 no share changes by more than a factor e.

    Raises:
        UserError: another number of weights than of losses, an unknown gate, or a weight or a temperature out of range.

    References:
        The DWA-KD paper names several teachers as future work; this gate is ours.
    """

    def __init__(
        self,
        losses: Sequence[DistillationLoss],
        weights: Sequence[float] | None = None,
        *,
        gate: str = "confidence",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            raise UserError(f"{len(losses)} teachers need as many weights, got {len(weights)}")
        for weight in weights:
            if not 1 / LARGEST <= weight <= LARGEST:
                raise UserError(f"teacher_weights must be above 0, from {1 / LARGEST:g} to {LARGEST:g}, got {weight!r}")
        if gate not in GATES:
            raise UserError(f"unknown teacher_gate {gate!r}; valid ones: {', '.join(GATES)}")
        low, high = TEMPERATURES
        if not low <= temperature <= high:
            raise UserError(
                f"teacher_gate_temperature must be a number at least {low:g} and at most {high:g}, got {temperature!r}"
            )
        self.losses = nn.ModuleList(losses)
        self.shares = [weight / sum(weights) for weight in weights]
        self.gate, self.temperature = gate, temperature
        self.needs_attention = any(loss.needs_attention for loss in losses)

    def set_step(self, step: int) -> None:
        """See `DistillationLoss.set_step`."""
        for loss in self.losses:
            loss.set_step(step)  # type: ignore[operator]

    def forward(
        self,
        student: ModelSide,
        teachers: Sequence[ModelSide],
        *,
        num_tokens: Tensor | float | None = None,
        teacher_scale: Sequence[TeacherScale] | None = None,
    ) -> LossOutput:
        """The loss of one batch; `teachers` and their scales in the order of `losses`.

        Terms are the shares' means over the teachers; `trust_1`, `trust_2` and so on are each teacher's mean share of the
        student-space divergence.

        Raises:
            ValueError: another number of teachers or scales than of losses, or what the method's loss refuses.
        """
        for what, given in (("teachers", teachers), ("teacher_scale", teacher_scale)):
            if given is not None and len(given) != len(self.losses):
                raise ValueError(f"expects {len(self.losses)} {what}, one for each loss, got {len(given)}")
        for loss, teacher in zip(self.losses, teachers, strict=True):
            loss.require_sides(student, teacher)  # type: ignore[operator]
        scales = teacher_scale or [TeacherScale.of(teacher) for teacher in teachers]
        trusts = self._trusts(student, teachers, scales)
        tokens = len(student.target_ids) if num_tokens is None else num_tokens
        outputs: list[LossOutput] = []
        for k, (loss, share) in enumerate(zip(self.losses, self.shares, strict=True)):
            teacher = teachers[k] if trusts is None else dataclasses.replace(teachers[k], trust=trusts[k] / share)
            outputs.append(loss(student, teacher, num_tokens=tokens, teacher_scale=scales[k]))
        total = self._weighted([output.loss for output in outputs])
        terms = {name: self._weighted([output.terms[name] for output in outputs]) for name in outputs[0].terms}
        if trusts is not None:
            terms |= {f"trust_{k + 1}": trust.sum() / tokens for k, trust in enumerate(trusts)}
        return LossOutput(total, terms)

    def _weighted(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * value for share, value in zip(self.shares, values, strict=True)]).sum(0)

    @torch.no_grad()
    def _trusts(
        self, student: ModelSide, teachers: Sequence[ModelSide], scales: Sequence[TeacherScale]
    ) -> Float[Tensor, "teachers tokens"] | None:
        """r of each teacher at each of the student's rows."""
        if self.gate == "weights":
            return None
        confidences = []
        for loss, teacher, scale in zip(self.losses, teachers, scales, strict=True):
            rows = loss.projected(student, teacher, scale)  # type: ignore[operator]
            if rows is None:
                return None
            confidences.append(head_loss([projected_rows(rows, student)], Confidence(), by_row=True).loss)
        stacked = torch.stack(confidences) / self.temperature
        return (stacked + stacked.new_tensor(self.shares).log()[:, None]).softmax(0)


class Confidence(Criterion):
    """Term `confidence`: the peak probability of each row."""

    def __init__(self) -> None:
        super().__init__({"confidence": 1.0})

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        return {"confidence": logits[0].log_softmax(-1).amax(-1).exp()}
