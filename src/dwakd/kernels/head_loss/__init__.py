"""Losses of next-token distributions straight from hidden rows, never holding rows x vocabulary for a whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.checks import require_targets
from dwakd.kernels.head_loss.criterion import Chunk, Criterion
from dwakd.kernels.head_loss.cross_entropy import CrossEntropy
from dwakd.kernels.head_loss.dual_space import ForwardKlSpace, StudentSpace, student_space, teacher_space
from dwakd.kernels.head_loss.engine import ChunkedHeadLoss, ChunkedRun, HeadRows
from dwakd.kernels.head_loss.naive import head_loss_naive
from dwakd.kernels.head_loss.prediction import WithPrediction
from dwakd.kernels.head_loss.statistics import entropy, forward_kl

__all__ = [
    "BUDGET_BYTES",
    "Chunk",
    "Criterion",
    "CrossEntropy",
    "ForwardKlSpace",
    "HeadLoss",
    "HeadRows",
    "StudentSpace",
    "WithPrediction",
    "entropy",
    "forward_kl",
    "head_loss",
    "student_space",
    "teacher_space",
]

IMPLS = ("auto", "naive", "chunked")
BUDGET_BYTES = 128 * 2**20
"""Logits held at a time. On CPUs half of it or twice as much changes the time of DWA-KD's loss by 3 %."""


@dataclass(frozen=True)
class HeadLoss:
    """What `head_loss` returns.

    Args:
        loss: the sum of rate x term; carries gradient. A value per row if asked for.
        terms: each term, likewise, without its rate and detached.
        statistics: the criterion's statistics of all rows, detached.
    """

    loss: Float[Tensor, "..."]
    terms: dict[str, Tensor]
    statistics: dict[str, Tensor]


def head_loss(
    sides: Sequence[HeadRows],
    criterion: Criterion,
    *,
    by_row: bool = False,
    impl: str = "auto",
    budget: int | None = None,
) -> HeadLoss:
    """A criterion's loss over all the rows of a batch, and its gradient, in memory that does not grow with the batch.

    The gradient is computed in the forward pass, chunk by chunk, and kept for the backward: as large as the hidden rows
    and, where a head trains, its weight. Nothing of it is computed where nothing requires gradient. Sides that share a
    head share its products. There is no double backward.

    Args:
        sides: one or more; student before teacher. Gradient reaches hidden rows and heads unless they are detached.
        criterion: what is computed of the sides' logits. Of half-precision heads it sees float32.
        by_row: give a value per row, each of which may then be weighted; the heads must be detached.
        impl: "auto", "naive" (plain torch on all rows at once: the specification) or "chunked". "auto" takes "chunked".
        budget: bytes of logits held at a time; `BUDGET_BYTES` if not given. A criterion without a gradient by hand adds
            autograd's temporaries, several times as much. A single row, and a single example of a
            criterion whose unit is the example, may exceed it. An example above it whose rows are weighted together
            costs one more product per side.

    Raises:
        ValueError: an unknown impl, a budget that is not positive, sides whose rows do not match, `by_row` with a
            head that requires gradient, or targets that are no tokens of the head, of which -100 is one. A GPU is not
            waited for: wrong targets there are a device-side assertion.

    Examples:
        >>> import torch
        >>> from dwakd.models.head import OutputHead
        >>> head = OutputHead(torch.randn(50, 8, requires_grad=True))
        >>> rows = HeadRows(torch.randn(6, 8, requires_grad=True), head, torch.tensor([4, 2]))
        >>> output = head_loss([rows], CrossEntropy(torch.arange(6)))
        >>> output.loss.backward()
        >>> head.weight.grad.shape
        torch.Size([50, 8])
    """
    if impl not in IMPLS:
        raise ValueError(f"head_loss: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}.")
    budget = BUDGET_BYTES if budget is None else budget
    if budget < 1:
        raise ValueError(f"head_loss: budget must be at least 1 byte, got {budget}.")
    counts = [side.hidden.shape[0] for side in sides]
    if criterion.unit != "examples" and len(set(counts)) > 1:
        raise ValueError(f"head_loss: {type(criterion).__name__} needs sides of equal rows, got {counts}.")
    for index, targets in criterion.targets_by_side().items():
        require_targets(f"head_loss: targets of {type(criterion).__name__}", targets, sides[index].head.vocab_size)
    if by_row and any(side.head.weight.requires_grad for side in sides):
        raise ValueError("head_loss: values by row need heads without gradient; use head.detached().")
    if impl == "naive":
        return HeadLoss(*head_loss_naive(sides, criterion, by_row=by_row))
    return _chunked(sides, criterion, budget, by_row=by_row)


def _chunked(sides: Sequence[HeadRows], criterion: Criterion, budget: int, *, by_row: bool) -> HeadLoss:
    run = ChunkedRun(sides, criterion, budget, by_row=by_row)
    loss, *constants = ChunkedHeadLoss.apply(run, *run.inputs())  # type: ignore[no-untyped-call]
    terms = dict(zip(run.term_names, constants, strict=False))
    return HeadLoss(loss, terms, dict(zip(run.statistic_names, constants[len(terms) :], strict=True)))
