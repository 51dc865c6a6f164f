"""What is computed from logits: the contract between the engine and a method."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "_ _"]
Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed together.

    Args:
        rows: of each side, in the packed batch.
        examples: the examples that these rows are the whole of; None where examples may be cut.
    """

    rows: tuple[slice, ...]
    examples: slice | None = None


class Criterion(ABC):
    """Terms of a loss as a function of logits, one tensor (tokens, vocab) for each side.

    A method writes `terms` in plain torch, and `statistics` and `weights` if rows are weighted by something that is
    known only when a whole example has been seen. The engine then cuts the batch into chunks and runs autograd inside
    each. A criterion on the hot path overrides `observe` and `differentiate` too, with the same gradient by hand and in
    place; `terms` stays as its specification.

    The logit of a token that the head forbids, by a bias of -inf, is -inf in plain torch and `forbidden_logit` in
    chunks. A term that it takes part in is infinite.

    Args:
        rates: each term's factor in the loss; the names are those of the terms.
    """

    unit: str = "rows"
    """What may not be cut: "rows" (all sides have the same rows, cut anywhere), "weights" (likewise, but `weights`
    needs the statistics of whole examples), "examples" (`terms` needs whole examples; sides may differ in rows)."""

    targets: Int[Tensor, " tokens"]
    """The target of each row of the first side; `head_loss` checks them. A criterion may have none."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates = rates

    def targets_by_side(self) -> dict[int, Int[Tensor, " tokens"]]:
        """The targets of those sides that have some."""
        return {0: self.targets} if hasattr(self, "targets") else {}

    @abstractmethod
    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        """Each term, a value per row or a sum, differentiable in the logits; `weights` are a constant per row."""

    def statistics(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        """Constants per row that `weights` asks for."""
        return {}

    def weights(self, statistics: Statistics, lengths: Int[Tensor, " batch"] | None) -> Float[Tensor, " tokens"] | None:
        """One constant per row from statistics; of whole examples with these lengths unless `unit` is "rows"."""
        return None

    def observe(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        """The statistics, for `weights` and `differentiate`; may overwrite the logits with what the latter reads."""
        return self.statistics(logits, chunk)

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        """The terms; the logits of each side that `needs` it give way to d (sum of rate x term) / d logits."""
        leaves = [side.detach().requires_grad_(need) for side, need in zip(logits, needs, strict=True)]
        with torch.set_grad_enabled(any(needs)):
            terms = self.terms(leaves, chunk, weights)
            total = torch.stack([self.rates[name] * value.sum() for name, value in terms.items()]).sum()
        learned = [index for index, need in enumerate(needs) if need]
        if learned:
            gradients = torch.autograd.grad(
                total, [leaves[index] for index in learned], allow_unused=True, materialize_grads=True
            )
            for index, gradient in zip(learned, gradients, strict=True):
                logits[index].copy_(gradient)
        return {name: value.detach() for name, value in terms.items()}
