"""Compute Soft-DTW in plain torch on any device: the specification and test reference of the other kernels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Costs = Float[Tensor, "batch n m"]
Starts = Int[Tensor, "batch n"]
Lengths = Int[Tensor, " batch"]


def solve(
    cost: Costs, gamma: float, x_lengths: Lengths, y_lengths: Lengths, keep: bool, starts: Starts | None = None
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """Compute the values and, if `keep` is true, their gradients (else an empty tensor).

    With A = -R / gamma, the recurrence is A[i, j] = logsumexp of the three predecessors - cost[i, j] / gamma. It is
    computed one anti-diagonal i + j at a time. The gradient of a cell is the probability that a path passes through it:
    the sum over the paths to the cell, times the sum over the paths from it, divided by the sum over all paths. The
    paths from the cell need a second recurrence from the end, computed together with the first. Both are in float64 if
    the device has it. A band is computed as a full table with infinite costs outside the band, one example at a time.
    """
    if starts is not None:
        rows = [slice(row, row + 1) for row in range(len(cost))]
        bands = [_solve_band(cost[row], gamma, x_lengths[row], y_lengths[row], keep, starts[row]) for row in rows]
        return torch.cat([value for value, _ in bands]), torch.cat([grad for _, grad in bands])
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
    after = _turned(after_turned + turned, x_lengths, y_lengths)  # includes a cell's own cost, unlike `before`
    # rounding can make the exponent positive, and large if costs are huge
    share = (before + after - end[:, None, None]).clamp(max=0.0).exp()
    none = end.isneginf()[:, None, None] | log_costs.isneginf()
    return value, share.masked_fill(none, 0.0).to(cost.dtype)


def _solve_band(
    cost: Costs, gamma: float, x_lengths: Lengths, y_lengths: Lengths, keep: bool, starts: Starts
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "..."]]:
    """Do the same as `solve` for a band: row i of `cost` holds the columns from starts[i] on."""
    m, width = int(y_lengths.max()), cost.shape[2]
    columns = (starts[:, :, None] + torch.arange(width, device=cost.device)).clamp(max=m + width - 1)
    full = cost.new_full((*cost.shape[:2], m + width), torch.inf).scatter(2, columns, cost)
    value, grad = solve(full[:, :, :m], gamma, x_lengths, y_lengths, keep)
    return value, torch.nn.functional.pad(grad, (0, width)).gather(2, columns) if keep else grad


def _log_costs(cost: Costs, gamma: float, x_lengths: Lengths, y_lengths: Lengths) -> Costs:
    """Return -cost / gamma; -inf outside the lengths, and NaN for a cost of -inf."""
    _, n, m = cost.shape
    rows, columns = torch.arange(n, device=cost.device), torch.arange(m, device=cost.device)
    outside = (rows[:, None] >= x_lengths[:, None, None]) | (columns >= y_lengths[:, None, None])
    scaled = cost.detach().to(torch.float32 if cost.device.type == "mps" else torch.float64) / -gamma
    return scaled.masked_fill(scaled.isposinf(), torch.nan).masked_fill(outside, -torch.inf)


def _log_sums(log_costs: Costs) -> Costs:
    """Compute for each cell the log of the sum of exp(log costs) over all paths that end before it."""
    batch, n, m = log_costs.shape
    sums = torch.empty_like(log_costs)
    flat_sums, flat_costs = sums.flatten(1), log_costs.flatten(1)
    # sums of the two diagonals before; index i + 1 is row i, and index 0 is the row before the first
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


def _turned(cost: Costs, x_lengths: Lengths, y_lengths: Lengths) -> Costs:
    """Rotate each example's table by 180 degrees, so that its last cell becomes the first; -inf outside the lengths."""
    batch, n, m = cost.shape
    examples = torch.arange(batch, device=cost.device)[:, None, None]
    rows = (x_lengths[:, None] - 1 - torch.arange(n, device=cost.device))[:, :, None]
    columns = (y_lengths[:, None] - 1 - torch.arange(m, device=cost.device))[:, None, :]
    turned = cost[examples, rows.clamp(min=0), columns.clamp(min=0)]
    return turned.masked_fill((rows < 0) | (columns < 0), -torch.inf)
