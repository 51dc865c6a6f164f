"""Compute sorted distances in plain torch for any device and dtype: the specification of the compiled kernel."""

import torch
from jaxtyping import Float
from torch import Tensor


def sorted_distance_naive(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Compute sorted distances with `torch.sort`; see `dwakd.kernels.sorted_distance` for arguments and results."""
    descending, order = learned.sort(-1, descending=True)
    opposite = target.sort(-1, descending=True).values
    width = max(descending.shape[1], opposite.shape[1])
    descending, opposite = (
        torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (descending, opposite)
    )
    gap = descending - opposite
    return gap.abs().sum(-1), torch.empty_like(learned).scatter_(-1, order, gap[:, : learned.shape[1]].sign())
