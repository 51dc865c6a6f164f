"""Compute Sinkhorn transport costs of a ragged batch with one differentiable function and two implementations."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dwakd.kernels.dispatch import resolve

Costs = Float[Tensor, "batch n m"]
Lengths = Int[Tensor, " batch"]


def sinkhorn(
    cost: Float[Tensor, "batch n m"],
    regularisation: float,
    iterations: int,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    impl: str = "auto",
) -> Float[Tensor, " batch"]:
    """Compute the cost <P, C> of transporting uniform mass from rows to columns, for each example.

    P starts as exp(-C / regularisation). Each iteration scales the rows of P to the sum 1 / x_length, then the columns
    to 1 / y_length. At the end, the sums of the columns are exact, and those of the rows approximate.

    Args:
        cost: pairwise costs; carries gradient through all iterations. Cells beyond an example's lengths may have any
            value, including NaN, and get zero gradient. Half precision is computed in float32.
        regularisation: in units of cost. Towards 0, the plan approaches the optimal one if there are enough iterations.
        iterations: number of scalings of rows and columns; at least 1.
        x_lengths: rows per example, 1 to n; all n when None.
        y_lengths: columns per example, 1 to m; all m when None.
        impl: "auto", "naive" (plain torch, example by example) or "batched" (all examples at once; each iteration
            stores vectors for the backward pass, not matrices). "auto" selects "batched".

    Returns:
        One value per example, in the unit of the costs: the mean cost per unit of mass.

    Raises:
        ValueError: `regularisation` or `iterations` is not positive and finite, or `impl` is unknown.

    References:
        Cuturi 2013, Sinkhorn Distances, algorithm 1, in the log domain.

    Examples:
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
        >>> round(2 * sinkhorn(cost, 0.1, 20).item(), 7)
        9.08e-05
    """
    if not 0 < regularisation < math.inf or iterations < 1:
        found = f"{regularisation} and {iterations}"
        raise ValueError(f"sinkhorn: regularisation and iterations must be positive and finite, got {found}")
    solve = _naive if resolve("sinkhorn", impl, {"batched": None}, ["batched"]) == "naive" else _batched
    batch, n, m = cost.shape
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    x_lengths = torch.full((batch,), n, device=cost.device) if x_lengths is None else x_lengths
    y_lengths = torch.full((batch,), m, device=cost.device) if y_lengths is None else y_lengths
    return solve(cost, regularisation, iterations, x_lengths, y_lengths)


def _naive(
    cost: Costs, regularisation: float, iterations: int, x_lengths: Lengths, y_lengths: Lengths
) -> Float[Tensor, " batch"]:
    """Compute the costs in plain torch, example by example: the specification of `_batched`."""
    values = []
    for matrix, rows, columns in zip(cost, x_lengths.tolist(), y_lengths.tolist(), strict=True):
        own = matrix[:rows, :columns]
        log_plan = -own / regularisation
        for _ in range(iterations):
            log_plan = log_plan.log_softmax(1) - math.log(rows)
            log_plan = log_plan.log_softmax(0) - math.log(columns)
        values.append((log_plan.exp() * own).sum())
    return torch.stack(values) if values else cost.sum((1, 2))


def _batched(
    cost: Costs, regularisation: float, iterations: int, x_lengths: Lengths, y_lengths: Lengths
) -> Float[Tensor, " batch"]:
    """Compute the costs of all examples at once.

    K is -C / regularisation, a and b are the marginals, and the plan is exp(K + f + g). From g = 0, the iterations
    compute f = log a - logsumexp_j(K + g) and g = log b - logsumexp_i(K + f) in turn.
    """
    log_a = _log_marginal(x_lengths.to(cost.device), cost.shape[1], cost.dtype)
    log_b = _log_marginal(y_lengths.to(cost.device), cost.shape[2], cost.dtype)
    cost = cost.masked_fill(log_a.isinf()[:, :, None] | log_b.isinf()[:, None, :], 0.0)
    kernel, g = -cost / regularisation, torch.where(log_b.isinf(), log_b, 0.0)

    def iterate(kernel: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        f = log_a - (kernel + g[:, None, :]).logsumexp(2)
        return f, log_b - (kernel + f[:, :, None]).logsumexp(1)

    for _ in range(iterations):  # recomputed in the backward pass, so that only the vectors g are stored
        f, g = checkpoint(iterate, kernel, g, use_reentrant=False, preserve_rng_state=False)
    plan = (kernel + f[:, :, None] + g[:, None, :]).exp()
    return (plan * cost).sum((1, 2))


def _log_marginal(lengths: Lengths, size: int, dtype: torch.dtype) -> Float[Tensor, "batch size"]:
    """Return log(1 / length) within an example and -inf beyond its length."""
    outside = torch.arange(size, device=lengths.device) >= lengths[:, None]
    return (-lengths.to(dtype).log())[:, None].expand(-1, size).masked_fill(outside, -torch.inf)
