"""The base class of every method: it checks the two sides, calls the method and reduces its terms to one loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide
from dwakd.kernels.head_loss import HeadLoss, HeadRows, active_weights
from dwakd.losses.options import MethodOptions, refuse_served
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import require_same_lengths, require_side, require_vocabularies
from dwakd.validation import parse

OptionsT = TypeVar("OptionsT", bound=MethodOptions)


@dataclass(frozen=True)
class Terms:
    """What a method computes for one batch. The base class divides every sum by the number of tokens.

    Args:
        sums: the unweighted value of each term by its public name, summed over the batch.
        total: the weighted sum of the terms that `head_loss` has computed, with their gradient.
        weights: the weight in the loss of each term that is not part of `total`. These terms carry their own gradient.
    """

    sums: Mapping[str, Tensor]
    total: Tensor
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, output: HeadLoss) -> "Terms":
        """Take all terms from one call of `head_loss`."""
        return cls(output.terms, output.loss)


class Projection(NamedTuple):
    """The teacher's state in the student's space for each student token.

    Args:
        hidden: the projected states.
        kept: whether the teacher has a token for each student token; None if it has one for all. The states of the others
            mean nothing.
    """

    hidden: Float[Tensor, "s_tokens s_hidden"]
    kept: Bool[Tensor, " s_tokens"] | None = None


class DistillationLoss(nn.Module, ABC, Generic[OptionsT]):
    """Base class of the methods. A method takes tensors and returns a scalar loss and named terms.

    It never runs a model, writes logs or moves tensors to another device. The constructor takes the fields of `options_type`
    as keyword arguments and, if the method learns maps between the models, also `widths` or `pair`. The parameters of the
    module (projectors) are trained together with the student. A subclass implements `compute`.

    Raises:
        UserError: an option is unknown or its value is not allowed.
    """

    options_type: type[OptionsT]
    terms: ClassVar[tuple[str, ...]]
    """Names of the terms that the method can report, in addition to `loss`."""
    given_terms: ClassVar[tuple[str, ...]] = ("ce",)
    """Names of the terms whose labels are the given responses. They are 0 in responses that the student sampled."""
    vocabularies: tuple[int, int] | None = None
    """Vocabulary sizes (student, teacher) that the method was built for; None if it works with any."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: OptionsT = parse(self.options_type, options)

    @property
    def needs_attention(self) -> bool:
        """Whether the loss reads `attention` of both sides."""
        return self.options.needs_attention

    @abstractmethod
    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        """Compute the terms of one batch from the checked sides.

        Args:
            student: the student's side.
            teacher: the teacher's side.
            scale: statistics for N(.) of the teacher's tensors.
            ce_weight: weight of the term `ce`, which replaces that of the options.
        """

    def forward(
        self,
        student: ModelSide,
        teacher: ModelSide | None = None,
        *,
        num_tokens: Tensor | float | None = None,
        teacher_scale: TeacherScale | None = None,
    ) -> LossOutput:
        """Compute the loss of one batch.

        Args:
            student: the student's side, with gradient. `given_terms` are left out if the student sampled the responses.
            teacher: the teacher's side of the same examples, without gradient. A method that needs no teacher ignores it.
            num_tokens: number of student response tokens in the whole optimiser batch, over all accumulation steps and
                ranks. Every term is a sum over this batch divided by it. Default: the tokens of this batch.
            teacher_scale: statistics over the whole optimiser batch for N(.). Default: those of this batch.

        Returns:
            The loss, and the mean of each term.

        Raises:
            ValueError: the teacher is missing, or a side is empty, inconsistent or does not fit the method. On a GPU,
                wrong values stop the process with a device-side assertion, because the host does not wait for them.
        """
        ce_weight = 0.0 if student.sampled else self.options.cross_entropy_weight
        if self.options.needs_teacher:
            teacher = self.require_sides(student, teacher)
            teacher_scale = teacher_scale or TeacherScale.of(teacher)
        else:
            require_side(student, "student")
        with torch.autocast(student.hidden.device.type, enabled=False):
            terms = self.compute(student, teacher, teacher_scale, ce_weight)  # type: ignore[arg-type]
        count = len(student.target_ids) if num_tokens is None else num_tokens
        weighted = [
            weight * (terms.sums[name] if weight else terms.sums[name].nan_to_num(0.0, 0.0, 0.0))  # 0 x inf is NaN
            for name, weight in active_weights(terms.weights).items()
        ]
        loss = torch.stack([terms.total, *weighted]).sum() / count
        means = {name: value.detach() / count for name, value in terms.sums.items()}
        if student.sampled:
            means |= {name: torch.zeros_like(means[name]) for name in self.given_terms if name in means}
        return LossOutput(loss, {**means, "loss": loss.detach()})

    def require_sides(self, student: ModelSide, teacher: ModelSide | None) -> ModelSide:
        """Return the teacher's side, or raise ValueError if the sides do not fit each other and the method."""
        if teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher: pass the teacher's side as second argument")
        if teacher.target_log_probs is not None:
            refuse_served(self.options)
        require_side(student, "student")
        require_side(teacher, "teacher")
        if len(student.lengths) != len(teacher.lengths):
            raise ValueError(
                f"the student's side has {len(student.lengths)} examples and the teacher's side {len(teacher.lengths)}; "
                "pass the same examples on both sides"
            )
        if self.vocabularies is not None:
            require_vocabularies((student, teacher), self.vocabularies)
        if self.options.needs_same_vocabulary:
            require_same_lengths(student, teacher, type(self).__name__)
        return teacher

    def set_step(self, step: int) -> None:
        """Set the number of finished optimiser steps. Called before each step; used by schedules."""

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Projection | None:
        """Return the teacher's state in the student's space for each student token, or None if the method has none."""
        return None


def head_rows(side: ModelSide) -> HeadRows:
    """Return the hidden states of a side with its own head, both with gradient."""
    return HeadRows(side.hidden, side.head, side.lengths, side.counts)


def constant_rows(side: ModelSide) -> HeadRows:
    """Return the hidden states of a side, usually a teacher's, with its own head, without gradient."""
    return HeadRows(side.hidden.detach(), side.head.detached(), side.lengths, side.counts)


def projected_rows(hidden: Tensor, side: ModelSide) -> HeadRows:
    """Return hidden states that were projected into the space of `side`, with its head. The head receives no gradient."""
    return HeadRows(hidden, side.head.detached(), side.lengths, side.counts)
