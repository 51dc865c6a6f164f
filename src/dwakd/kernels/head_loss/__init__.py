"""Compute losses of next-token distributions from hidden states, without storing the logits of a whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.checks import require_targets
from dwakd.kernels.dispatch import resolve
from dwakd.kernels.head_loss.criterion import (
    Chunk,
    Criterion,
    CrossEntropy,
    HeadRows,
    Statistics,
    WithPrediction,
    active_weights,
    nonzero,
    only_part,
    only_term,
    scaled_terms,
)
from dwakd.kernels.head_loss.dual_space import student_space, teacher_space
from dwakd.kernels.head_loss.engine import ChunkedHeadLoss, ChunkedRun
from dwakd.kernels.head_loss.statistics import entropy, forward_kl

__all__ = [
    "BUDGET_BYTES",
    "Chunk",
    "Criterion",
    "CrossEntropy",
    "HeadLoss",
    "HeadRows",
    "WithPrediction",
    "active_weights",
    "entropy",
    "forward_kl",
    "head_loss",
    "only_part",
    "only_term",
    "scaled_terms",
    "student_space",
    "teacher_space",
]

BUDGET_BYTES = 128 * 2**20
"""Default memory for logits. On CPUs, half or twice this value changes the time of DWA-KD's loss by 3 %."""


@dataclass(frozen=True)
class HeadLoss:
    """The result of `head_loss`: `loss` is the sum of rate x term and carries gradient.

    `terms` and `statistics` are detached. With `by_row`, `loss` and each term have one value per token.
    """

    loss: Float[Tensor, "..."]
    terms: dict[str, Tensor]
    statistics: Statistics


def head_loss(
    sides: Sequence[HeadRows],
    criterion: Criterion,
    *,
    by_row: bool = False,
    impl: str = "auto",
    budget: int | None = None,
) -> HeadLoss:
    """Compute a criterion's loss over all tokens of a batch; the memory for logits does not grow with the batch.

    The forward pass computes the gradient chunk by chunk and stores it for the backward pass, for those inputs that
    require it. Sides with the same head share its matrix products. Double backward is not supported.

    Args:
        sides: one or more sides, the student before the teacher. Gradient reaches their hidden states and heads unless
            these are detached.
        criterion: computes the terms from the logits. With half-precision heads it receives float32 logits.
        by_row: return one value per token, so that the caller can weight each token; requires detached heads.
        impl: "auto", "naive" (plain torch on all tokens at once; the specification) or "chunked". "auto" selects
            "chunked".
        budget: most bytes of logits in memory; `BUDGET_BYTES` by default. A criterion without a hand-written gradient
            also needs autograd's temporaries, which are several times as large. A single token may exceed the budget,
            and so may a single example if the criterion needs whole examples.

    Raises:
        ValueError: `impl` is unknown, `budget` is not positive, the sides have different numbers of tokens, `by_row` is
            set and a head requires gradient, or a target is not a token id (on a GPU, a device-side assertion fails).

    Examples:
        >>> import torch
        >>> from dwakd.batch import OutputHead
        >>> from dwakd.kernels.head_loss import CrossEntropy, HeadRows
        >>> head = OutputHead(torch.randn(50, 8, requires_grad=True))
        >>> rows = HeadRows(torch.randn(6, 8, requires_grad=True), head, torch.tensor([4, 2]))
        >>> output = head_loss([rows], CrossEntropy(torch.arange(6)))
        >>> output.loss.backward()
        >>> head.weight.grad.shape
        torch.Size([50, 8])
    """
    impl = resolve("head_loss", impl, {"chunked": None}, ["chunked"])
    budget = BUDGET_BYTES if budget is None else budget
    if budget < 1:
        raise ValueError(f"head_loss: budget must be at least 1 byte, got {budget}")
    counts = [side.hidden.shape[0] for side in sides]
    if criterion.unit != "examples" and len(set(counts)) > 1:
        raise ValueError(
            f"head_loss: {type(criterion).__name__} needs the same number of tokens on all sides, got {counts}"
        )
    for index, targets in criterion.targets_by_side().items():
        require_targets(f"head_loss: targets of {type(criterion).__name__}", targets, sides[index].head.vocab_size)
    learned = (part for side in sides for part in (side.head.weight, side.head.bias))
    if by_row and any(part is not None and part.requires_grad for part in learned):
        raise ValueError("head_loss: by_row requires heads without gradient: use head.detached()")
    if impl == "naive":
        return _naive(sides, criterion, by_row=by_row)
    run = ChunkedRun(sides, criterion, budget, by_row=by_row)
    loss, *constants = ChunkedHeadLoss.apply(run, *run.inputs)  # type: ignore[no-untyped-call]
    terms = dict(zip(criterion.rates, constants, strict=False))
    return HeadLoss(loss, terms, dict(zip(run.statistic_names, constants[len(terms) :], strict=True)))


def _naive(sides: Sequence[HeadRows], criterion: Criterion, *, by_row: bool) -> HeadLoss:
    """Compute the loss in plain torch over all tokens at once, with autograd: the specification of the engine."""
    logits = [side.head.logits(side.hidden) for side in sides]
    chunk = Chunk(tuple(slice(0, len(side.hidden)) for side in sides), slice(0, len(sides[0].lengths)))
    with torch.no_grad():
        statistics = criterion.statistics([side.detach() for side in logits], chunk)
        weights = criterion.weights(statistics, sides[0].lengths)
    terms = criterion.terms(logits, chunk, weights)
    if not by_row:
        terms = {name: value.sum() for name, value in terms.items()}
    loss = torch.stack([rate * terms[name] for name, rate in nonzero(criterion.rates).items()]).sum(0)
    return HeadLoss(loss, {name: value.detach() for name, value in terms.items()}, statistics)
