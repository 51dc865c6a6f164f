"""What every method shares: the signature and the one reduction."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide
from dwakd.kernels.checks import require
from dwakd.kernels.head_loss import HeadRows
from dwakd.losses.attention import TeacherScale
from dwakd.losses.sides import require_both, require_vocabularies

LARGEST = 1e30
"""Bound of all options: a product with a term must stay finite in float32."""
TEMPERATURES = (1e-3, 1e3)
"""Of a softmax. Fused kernels take softmax(x) from exp(x / temperature), with a relative error of 1e-7 x temperature."""


class DistillationLoss(nn.Module, ABC):
    """A method: pure tensors in, a scalar and named terms out. It never runs a model, logs or moves devices.

    The constructor takes the method's options as keywords and, where it learns maps between the models, their
    `widths`. Parameters of the module are the method's own (projectors) and train with the student.
    """

    terms: ClassVar[tuple[str, ...]]
    """Names of the terms it may report, beside `loss`."""
    needs_teacher: ClassVar[bool] = True
    """Whether a teacher must be given."""
    needs_widths: ClassVar[bool] = False
    """Whether the constructor takes `widths`."""
    needs_pair: ClassVar[bool] = False
    """Whether the constructor takes `pair`, a `ModelPair`: vocabularies and heads."""
    needs_same_vocabulary: bool = False
    """Whether student and teacher must share one tokenizer; an option may decide it."""
    needs_edit_alignment: ClassVar[bool] = False
    """Whether it reads `aligned_rows` of the teacher's side."""
    needs_attention: bool = False
    """Whether it reads `attention` of both sides; an option may decide it."""

    def set_step(self, step: int) -> None:
        """Told the number of finished optimiser steps before each step; only schedules care."""

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Tensor | None:
        """The teacher in the student's space, one row for each of the student's, where the method has such a thing."""
        return None

    @abstractmethod
    def forward(
        self,
        student: ModelSide,
        teacher: ModelSide | None = None,
        *,
        num_tokens: Tensor | float | None = None,
        teacher_scale: TeacherScale | None = None,
    ) -> LossOutput:
        """The loss of one batch.

        Args:
            student: rows with gradient.
            teacher: rows without.
            num_tokens: the student's response tokens of the whole optimiser batch, over accumulation steps and ranks;
                those of this batch if not given. Every term is a sum over this batch divided by it.
            teacher_scale: moments over the whole optimiser batch for N(.); those of this batch if not given.
        """


def reduce_terms(
    sums: dict[str, Tensor],
    weights: dict[str, float],
    num_tokens: Tensor | float | int,
    total: Tensor | None = None,
) -> LossOutput:
    """Divide each summed term by the number of tokens and add them up with their weights.

    Args:
        sums: over the batch, by public name.
        weights: of the terms that carry gradient; the others must be part of `total`.
        num_tokens: what every term is divided by.
        total: weighted sum of the terms without an entry in `weights`, with their gradient (`head_loss`).
    """
    parts = [weights[name] * sums[name] for name in weights if name in sums]
    loss = torch.stack(parts if total is None else [total, *parts]).sum() / num_tokens
    means = {name: value.detach() / num_tokens for name, value in sums.items()}
    return LossOutput(loss, {**means, "loss": loss.detach()})


def head_rows(side: ModelSide) -> HeadRows:
    """A side's own rows, with its head."""
    return HeadRows(side.hidden, side.head, side.lengths, side.counts)


def constant_rows(side: ModelSide) -> HeadRows:
    """A side's own rows and head without gradient: a teacher's."""
    return HeadRows(side.hidden.detach(), side.head.detached(), side.lengths, side.counts)


def projected_rows(hidden: Tensor, side: ModelSide) -> HeadRows:
    """Another model's states in this side's space; the head is a constant to them."""
    return HeadRows(hidden, side.head.detached(), side.lengths, side.counts)


def require_sides(
    student: ModelSide, teacher: ModelSide | None, method: str, vocabularies: tuple[int, int] | None = None
) -> ModelSide:
    """The teacher's side, once both sides are checked.

    Args:
        student: of the batch.
        teacher: likewise.
        method: its name, for the message.
        vocabularies: rows of the two heads, if the method's maps of tokens fit no others.

    Raises:
        ValueError: the teacher is missing, or a side is empty, inconsistent or does not fit. Values on a GPU are not
            waited for: wrong ones are a device-side assertion.
    """
    if teacher is None:
        raise ValueError(f"method {method} needs a teacher")
    require_both(student, teacher)
    if vocabularies is not None:
        require_vocabularies((student, teacher), vocabularies)
    return teacher


def require_same_rows(student: ModelSide, teacher: ModelSide, method: str) -> None:
    """Raise ValueError unless the two sides have the same rows in each example, as one tokenizer gives them."""
    rows = [side.target_ids.shape[0] for side in (student, teacher)]
    if rows[0] != rows[1]:
        raise ValueError(
            f"method {method} compares models of one tokenizer row by row, but got {rows[0]} rows of the student and "
            f"{rows[1]} of the teacher; give both the same response"
        )
    require(
        (student.lengths == teacher.lengths).all(),
        f"method {method} compares models of one tokenizer row by row: teacher.lengths must be student.lengths",
        lambda: f"{teacher.lengths.tolist()} and {student.lengths.tolist()}",
    )


def check_range(**options: tuple[float, float, float]) -> None:
    """Raise ValueError for the first option (value, low, high) that lies outside its closed range.

    No option may be NaN, infinite or above `LARGEST`.
    """
    for name, (value, low, high) in options.items():
        highest, is_number = min(high, LARGEST), isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and low <= value <= highest):
            bound = f"between {low:g} and {high:g}" if high <= 1 else f"at least {low:g} and at most {highest:g}"
            raise ValueError(f"{name} must be a number {bound}, got {value!r}")
