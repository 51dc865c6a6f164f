"""Compute losses of next-token distributions from hidden states, without storing the logits of a whole batch."""

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
"""Default memory for logits. On CPUs, half or twice this value changes the time of DWA-KD's loss by 3 %."""


@dataclass(frozen=True)
class HeadLoss:
    """The result of `head_loss`.

    Args:
        loss: the sum of rate x term; carries gradient. One value per token with `by_row`, else a scalar.
        terms: each term without its rate, of the same shape as `loss`; detached.
        statistics: the criterion's statistics of all tokens; detached.
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
    """Compute a criterion's loss over all tokens of a batch; the memory for logits does not grow with the batch.

    The forward pass computes the gradient chunk by chunk and stores it for the backward pass. The stored gradient is as
    large as the hidden states and, if a head is trained, its weight. It is computed only if an input requires
    gradient. Sides with the same head share its matrix products. Double backward is not supported.

    Args:
        sides: one or more sides, the student before the teacher. Gradient reaches their hidden states and heads unless
            these are detached.
        criterion: computes the terms from the logits. With half-precision heads it receives float32 logits.
        by_row: return one value per token, so that the caller can weight each token; requires detached heads.
        impl: "auto", "naive" (plain torch on all tokens at once; the specification) or "chunked". "auto" selects
            "chunked".
        budget: most bytes of logits in memory; `BUDGET_BYTES` by default. A criterion without a hand-written gradient
            also needs autograd's temporaries, which are several times as large. A single token may exceed the budget,
            and so may a single example if the criterion needs whole examples. An example above the budget whose
            tokens are weighted together needs one more matrix product per side.

    Raises:
        ValueError: `impl` is unknown, `budget` is not positive, the sides have different numbers of tokens, `by_row` is
            set and a head requires gradient, or a target is not a token id (for example -100). On a GPU, an invalid
            target causes a device-side assertion instead.

    Examples:
        >>> import torch
        >>> from dwakd.batch import OutputHead
        >>> head = OutputHead(torch.randn(50, 8, requires_grad=True))
        >>> rows = HeadRows(torch.randn(6, 8, requires_grad=True), head, torch.tensor([4, 2]))
        >>> output = head_loss([rows], CrossEntropy(torch.arange(6)))
        >>> output.loss.backward()
        >>> head.weight.grad.shape
        torch.Size([50, 8])
    """
    if impl not in IMPLS:
        raise ValueError(f"head_loss: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}")
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
    if by_row and any(side.head.weight.requires_grad for side in sides):
        raise ValueError("head_loss: by_row requires heads without gradient: use head.detached()")
    if impl == "naive":
        return HeadLoss(*head_loss_naive(sides, criterion, by_row=by_row))
    return _chunked(sides, criterion, budget, by_row=by_row)


def _chunked(sides: Sequence[HeadRows], criterion: Criterion, budget: int, *, by_row: bool) -> HeadLoss:
    run = ChunkedRun(sides, criterion, budget, by_row=by_row)
    loss, *constants = ChunkedHeadLoss.apply(run, *run.inputs())  # type: ignore[no-untyped-call]
    terms = dict(zip(run.term_names, constants, strict=False))
    return HeadLoss(loss, terms, dict(zip(run.statistic_names, constants[len(terms) :], strict=True)))
