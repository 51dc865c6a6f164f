"""Compute the cross-entropy of the targets, with a hand-written gradient."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dwakd.kernels.head_loss.criterion import Chunk, Criterion, Logits, Statistics
from dwakd.kernels.head_loss.statistics import blocks, peak_of, pick, shifted_exp, subtract_at


class CrossEntropy(Criterion):
    """Cross-entropy of one side in nats: the term `ce` is -log p(target).

    Args:
        targets: token id of each position.
        rate: factor of the term in the loss.
    """

    def __init__(self, targets: Int[Tensor, " tokens"], rate: float = 1.0) -> None:
        super().__init__({"ce": rate})
        self.targets = targets

    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        log_probs = logits[0].log_softmax(-1)
        return {"ce": torch.nn.functional.nll_loss(log_probs, self.targets[chunk.rows[0]], reduction="none")}

    def observe(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        columns = logits[0].t()
        peak, chosen = peak_of(columns), pick(columns, self.targets[chunk.rows[0]])
        total = torch.zeros_like(peak)
        for block in blocks(columns):
            total += shifted_exp(columns[block], peak).sum(0)
        return {"total": total, "ce": total.log() + peak - chosen}

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        if needs[0]:
            columns = logits[0].t()
            columns.mul_(self.rates["ce"] / statistics["total"])
            subtract_at(columns, self.targets[chunk.rows[0]], torch.full_like(statistics["ce"], self.rates["ce"]))
        return {"ce": statistics["ce"]}
