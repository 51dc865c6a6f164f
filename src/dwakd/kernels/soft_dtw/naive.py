"""Soft-DTW in plain torch: the specification of every other kernel, their oracle, and the one for any device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Lengths = Int[Tensor, " batch"]


def solve(
    cost: Float[Tensor, "batch n m"], gamma: float, x_lengths: Lengths, y_lengths: Lengths, keep: bool
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """The values, and where `keep` their gradients (else an empty tensor).

    With A = -R / gamma the recurrence is A[i, j] = logsumexp of the three predecessors - cost[i, j] / gamma, one
    anti-diagonal i + j at a time. The share of a cell in all alignments, its gradient, is the sum over the ways to it
    times the sum over the ways from it, over the sum of all: a second recurrence, from the end, that runs beside the
    first. In float64, where the device has it.
    """
    log_costs = _log_costs(cost, gamma, x_lengths, y_lengths)
    if keep:
        turned = _turned(log_costs, x_lengths, y_lengths)
        before, after_turned = _log_sums(torch.cat((log_costs, turned))).chunk(2)
    else:
        before = _log_sums(log_costs)
    end = (before + log_costs)[torch.arange(len(cost), device=cost.device), x_lengths - 1, y_lengths - 1]
    value = (-gamma * end).to(cost.dtype)
    if not keep:
        return value, cost.new_empty(0)
    after = _turned(after_turned + turned, x_lengths, y_lengths)  # a cell's own cost is in `after`, not in `before`
    share = (before + after - end[:, None, None]).exp()
    none = end.isneginf()[:, None, None] | log_costs.isneginf()
    return value, share.masked_fill(none, 0.0).to(cost.dtype)


def _log_costs(
    cost: Float[Tensor, "batch n m"], gamma: float, x_lengths: Lengths, y_lengths: Lengths
) -> Float[Tensor, "batch n m"]:
    """-cost / gamma; -inf outside the lengths, and NaN for a cost of -inf."""
    _, n, m = cost.shape
    rows, columns = torch.arange(n, device=cost.device), torch.arange(m, device=cost.device)
    outside = (rows[:, None] >= x_lengths[:, None, None]) | (columns >= y_lengths[:, None, None])
    scaled = cost.detach().to(torch.float32 if cost.device.type == "mps" else torch.float64) / -gamma
    return scaled.masked_fill(scaled.isposinf(), torch.nan).masked_fill(outside, -torch.inf)


def _log_sums(log_costs: Float[Tensor, "batch n m"]) -> Float[Tensor, "batch n m"]:
    """For each cell log of the sum, over all ways from the first cell to before it, of exp(their log costs)."""
    batch, n, m = log_costs.shape
    sums = torch.empty_like(log_costs)
    flat_sums, flat_costs = sums.flatten(1), log_costs.flatten(1)
    # what was reached on the two diagonals before; row i at i + 1, 0 is the row before the first
    before, last, now = log_costs.new_full((3, batch, n + 1), -torch.inf)
    before[:, 0] = 0.0  # the corner before the first cell
    for k in range(n + m - 1):
        first, end = max(0, k - m + 1), min(n, k + 1)
        diagonal = slice(first * (m - 1) + k, (end - 1) * (m - 1) + k + 1, max(m - 1, 1))
        reached = torch.stack((last[:, first:end], last[:, first + 1 : end + 1], before[:, first:end]))
        flat_sums[:, diagonal] = total = reached.logsumexp(0)
        torch.add(total, flat_costs[:, diagonal], out=now[:, first + 1 : end + 1])
        now[:, first] = -torch.inf
        before, last, now = last, now, before
    return sums


def _turned(cost: Float[Tensor, "batch n m"], x_lengths: Lengths, y_lengths: Lengths) -> Float[Tensor, "batch n m"]:
    """Each example's table turned by half a circle: its last cell becomes the first. -inf outside the lengths."""
    batch, n, m = cost.shape
    examples = torch.arange(batch, device=cost.device)[:, None, None]
    rows = (x_lengths[:, None] - 1 - torch.arange(n, device=cost.device))[:, :, None]
    columns = (y_lengths[:, None] - 1 - torch.arange(m, device=cost.device))[:, None, :]
    turned = cost[examples, rows.clamp(min=0), columns.clamp(min=0)]
    return turned.masked_fill((rows < 0) | (columns < 0), -torch.inf)
