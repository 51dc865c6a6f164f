"""Define the interface between the chunked engine and the loss terms that a method computes from logits."""

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
    """Tokens that are computed together.

    Args:
        rows: range of tokens of each side in the packed batch.
        examples: the examples that consist of these tokens; None if an example may be divided into several chunks.
    """

    rows: tuple[slice, ...]
    examples: slice | None = None


class Criterion(ABC):
    """Base class of loss terms that are computed from logits, one tensor of shape (tokens, vocab) for each side.

    A subclass implements `terms` in plain torch. It also implements `statistics` and `weights` if the weight of a token
    depends on other tokens of its example. The engine divides the batch into chunks and runs autograd in each chunk. A
    criterion whose speed matters also overrides `observe` and `differentiate`, which compute the same gradient by hand
    and in place. `terms` then remains as the specification.

    If a bias of -inf forbids a token, its logit is -inf in plain torch and `forbidden_logit` in chunks. A term that
    uses this logit is infinite.

    Args:
        rates: factor of each term in the loss, by the name of the term.
    """

    unit: str = "rows"
    """How a batch may be divided. "rows": anywhere, and all sides have the same number of tokens. "weights": the same,
    but `weights` needs the statistics of whole examples. "examples": only between examples, because `terms` needs
    whole ones; the sides may have different numbers of tokens."""

    targets: Int[Tensor, " tokens"]
    """Target of each token of the first side, validated by `head_loss`. A criterion may have no targets."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates = rates

    def targets_by_side(self) -> dict[int, Int[Tensor, " tokens"]]:
        """Return the targets by the index of their side, for the sides that have targets."""
        return {0: self.targets} if hasattr(self, "targets") else {}

    @abstractmethod
    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        """Compute each term, per token or summed, differentiable in the logits; `weights` are constants per token."""

    def statistics(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        """Compute the values per token that `weights` needs; they carry no gradient."""
        return {}

    def weights(self, statistics: Statistics, lengths: Int[Tensor, " batch"] | None) -> Float[Tensor, " tokens"] | None:
        """Compute one constant weight per token.

        Unless `unit` is "rows", the statistics are those of whole examples with these lengths.
        """
        return None

    def observe(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        """Compute the statistics; may overwrite the logits with the input of `differentiate`."""
        return self.statistics(logits, chunk)

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        """Return the terms, and overwrite the logits of each side in `needs` with d (sum of rate x term) / d logits."""
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
