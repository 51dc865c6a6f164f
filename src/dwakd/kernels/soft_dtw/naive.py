"""Soft-DTW in plain torch: the specification of every other kernel, their oracle, and the one for any device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def soft_dtw_naive(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Soft-DTW of a ragged batch; arguments and guarantees are those of `dwakd.kernels.soft_dtw`.

    R[i, j] = cost[i, j] + softmin(R[i - 1, j], R[i, j - 1], R[i - 1, j - 1]), one anti-diagonal i + j at a time.
    Autograd differentiates it.
    """
    batch, n, m = cost.shape
    rows, columns = torch.arange(n, device=cost.device), torch.arange(m, device=cost.device)
    valid = (rows[:, None] < x_lengths[:, None, None]) & (columns < y_lengths[:, None, None])
    slanted = _slant(cost.masked_fill(~valid, torch.inf))

    outside = cost.new_full((batch, 1), torch.inf)
    before, last = (
        outside.expand(-1, n + 1),
        outside.expand(-1, n + 1),
    )  # diagonals k - 2, k - 1; column 0 is i = -1
    diagonals = []
    for k in range(n + m - 1):
        if k == 0:
            reached = slanted[:, :, 0]
        else:
            reached = slanted[:, :, k] + _softmin(torch.stack((last[:, :-1], last[:, 1:], before[:, :-1])), gamma)
        diagonals.append(reached)
        before, last = last, torch.cat((outside, reached), dim=1)
    table = torch.stack(diagonals, dim=1)
    end = table[torch.arange(batch, device=cost.device), x_lengths + y_lengths - 2, x_lengths - 1]
    # `where` gives the cost at an unreachable end zero gradient, not one
    return torch.where(end.isposinf(), torch.inf, end)


def _slant(cost: Float[Tensor, "batch n m"]) -> Float[Tensor, "batch n diagonals"]:
    """Row i moved right by i, so that column k holds the anti-diagonal i + j = k; +inf outside the table."""
    batch, n, m = cost.shape
    wide = torch.nn.functional.pad(cost, (0, n), value=torch.inf)
    return wide.flatten(1)[:, : n * (n + m - 1)].reshape(batch, n, n + m - 1)


def _softmin(reached: Float[Tensor, "predecessors batch n"], gamma: float) -> Float[Tensor, "batch n"]:
    """-gamma log sum exp(-reached / gamma) over the first axis; +inf, with zero gradient, where all are +inf."""
    lowest = reached.detach().amin(dim=0)
    unreachable = lowest.isposinf()
    lowest = lowest.masked_fill(unreachable, 0.0)
    total = torch.exp((lowest - reached) / gamma).sum(dim=0)
    soft = lowest - gamma * torch.log(total.masked_fill(unreachable, 1.0))
    return soft.masked_fill(unreachable, torch.inf)
