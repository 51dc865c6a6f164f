"""Compute Sinkhorn transport costs of a ragged batch with one differentiable function and two kernels."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.kernels.sinkhorn.batched import sinkhorn_batched
from dwakd.kernels.sinkhorn.naive import sinkhorn_naive

IMPLS = ("auto", "naive", "batched")


def sinkhorn(
    cost: Float[Tensor, "batch n m"],
    regularisation: float,
    iterations: int,
    x_lengths: Int[Tensor, " batch"] | None = None,
    y_lengths: Int[Tensor, " batch"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, " batch"]:
    """Compute the cost <P, C> of transporting uniform mass from rows to columns, for each example.

    P starts as exp(-C / regularisation). Each iteration scales the rows of P to the sum 1 / x_length, then the columns
    to 1 / y_length. At the end, the sums of the columns are exact and those of the rows nearly so.

    Args:
        cost: pairwise costs; carries gradient through all iterations, without double backward. Cells beyond an
            example's lengths may have any value, including NaN, and get zero gradient. Half precision is computed in
            float32.
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
    if impl not in IMPLS:
        raise ValueError(f"sinkhorn: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}")
    if not regularisation < math.inf:
        raise ValueError(f"sinkhorn: regularisation must be finite, got {regularisation}")
    if regularisation <= 0 or iterations < 1:
        raise ValueError(
            f"sinkhorn: regularisation and iterations must be positive, got {regularisation} and {iterations}"
        )
    batch, n, m = cost.shape
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    x_lengths = torch.full((batch,), n, device=cost.device) if x_lengths is None else x_lengths
    y_lengths = torch.full((batch,), m, device=cost.device) if y_lengths is None else y_lengths
    kernel = sinkhorn_naive if impl == "naive" else sinkhorn_batched
    return kernel(cost, regularisation, iterations, x_lengths, y_lengths)
