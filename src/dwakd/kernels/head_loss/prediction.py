"""Compute the most probable token of a side together with another criterion."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from dwakd.kernels.head_loss.criterion import Chunk, Criterion, Logits, Statistics
from dwakd.kernels.head_loss.statistics import cpu_module, is_compiled


def most_probable(logits: Float[Tensor, "vocab tokens"]) -> Int[Tensor, " tokens"]:
    """Return the first token id of the largest logit in each column.

    A compiled kernel does this on CPUs, where `argmax` over rows is slow.
    """
    return cpu_module().most_probable(logits) if is_compiled(logits) else logits.argmax(0)


class WithPrediction(Criterion):
    """Add the statistic `prediction`, the most probable token of a side, to another criterion.

    Args:
        criterion: the criterion to extend.
        side: index of the side to predict.
    """

    def __init__(self, criterion: Criterion, side: int) -> None:
        super().__init__(criterion.rates)
        self.unit = criterion.unit
        self.criterion, self.side = criterion, side

    def targets_by_side(self) -> dict[int, Tensor]:
        return self.criterion.targets_by_side()

    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        return self.criterion.terms(logits, chunk, weights)

    def statistics(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        return self.criterion.statistics(logits, chunk) | {"prediction": logits[self.side].argmax(-1)}

    def weights(self, statistics: Statistics, lengths: Int[Tensor, " batch"] | None) -> Float[Tensor, " tokens"] | None:
        return self.criterion.weights(statistics, lengths)

    def observe(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        prediction = most_probable(logits[self.side].t())
        return self.criterion.observe(logits, chunk) | {"prediction": prediction}

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        return self.criterion.differentiate(logits, chunk, statistics, weights, needs)
