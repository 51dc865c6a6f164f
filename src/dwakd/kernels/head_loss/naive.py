"""Compute head losses in plain torch over all tokens at once: the specification and test reference of the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dwakd.kernels.head_loss.criterion import Chunk, Criterion, Statistics
from dwakd.kernels.head_loss.engine import HeadRows


def head_loss_naive(
    sides: Sequence[HeadRows], criterion: Criterion, *, by_row: bool
) -> tuple[Tensor, dict[str, Tensor], Statistics]:
    """Return loss, terms and statistics as `head_loss` does; autograd differentiates the loss."""
    logits = [side.head.logits(side.hidden) for side in sides]
    chunk = Chunk(tuple(slice(0, len(side.hidden)) for side in sides), slice(0, len(sides[0].lengths)))
    with torch.no_grad():
        statistics = criterion.statistics([side.detach() for side in logits], chunk)
        weights = criterion.weights(statistics, sides[0].lengths)
    terms = criterion.terms(logits, chunk, weights)
    if not by_row:
        terms = {name: value.sum() for name, value in terms.items()}
    loss = torch.stack([criterion.rates[name] * value for name, value in terms.items()]).sum(0)
    return loss, {name: value.detach() for name, value in terms.items()}, statistics
