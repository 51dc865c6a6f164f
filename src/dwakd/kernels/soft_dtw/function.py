"""Compute Soft-DTW of a ragged batch with one differentiable function and several kernels."""

import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.dispatch import module_of, resolve
from dwakd.kernels.soft_dtw.band import require_band

Impl = Literal["auto", "naive", "cpu", "triton"]
"""Names of the kernels; "auto" selects one of them."""
PREFERRED = ("cpu", "triton")
"""Kernels that "auto" tries in this order, before "naive". A kernel that is not here runs only if it is named."""


def soft_dtw(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"] | None = None,
    y_lengths: Int[Tensor, " batch"] | None = None,
    impl: str = "auto",
    *,
    starts: Int[Tensor, "batch n"] | None = None,
) -> Float[Tensor, " batch"]:
    """Compute the soft minimum of the summed cost over all monotone alignments, for each example.

    s = R[x_length - 1, y_length - 1], R[i, j] = cost[i, j] + softmin(R[i - 1, j], R[i, j - 1], R[i - 1, j - 1]),
    softmin(a) = -gamma log sum exp(-a / gamma).

    The value is below the cost of every alignment and often negative. If all costs are 0, it is -gamma log of the
    number of alignments. Cells beyond an example's lengths may have any value, including NaN, and get zero gradient.

    Args:
        cost: pairwise costs; carries gradient, without double backward. +inf forbids a cell. NaN or -inf within the
            lengths gives NaN. Half precision is computed in float32.
        gamma: temperature of the soft minimum, in units of cost, tested from 1e-3 to 1e4. Towards 0, the result
            approaches that of hard DTW.
        x_lengths: rows per example, 1 to n; all n when None.
        y_lengths: columns per example, 1 to m; all m when None.
        impl: "auto", "naive" (plain torch, any device), "cpu" (compiled by numba, for CPU tensors) or "triton" (for
            CUDA tensors). "auto" selects the compiled kernel for the device if it can run; a fallback is logged once.
        starts: if given, `cost` holds a band of the table, and paths stay inside the band. cost[b, i, t] is the cost of
            row i and column starts[b, i] + t, and y_lengths may exceed the last dimension of `cost`. The band starts at
            column 0, its starts do not decrease, neighbouring rows have a column in common, and the last row contains
            the last column. Entries beyond the last column are ignored, as are the starts of rows beyond x_length.

    Returns:
        One value per example, in the unit of the costs and in float32 or better; +inf with zero gradient if no path has
        a finite cost. The gradient of a cell is the probability that a path passes through it, where a path is drawn in
        proportion to exp(-cost / gamma).

    Raises:
        ValueError: `gamma` is not positive and finite, a length is outside its range, `starts` is not a band, or `impl` is
            unknown or does not support the tensor's device. Lengths on a GPU are not validated; an invalid one gives NaN.
        ImportError: `impl` is "cpu" or "triton", and numba or triton cannot be imported.

    References:
        Cuturi and Blondel 2017, Soft-DTW: a Differentiable Loss Function for Time-Series, algorithms 1 and 2.

    Examples:
        >>> cost = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]])
        >>> round(soft_dtw(cost, gamma=1.0).item(), 4)
        0.2329
    """
    problem = _checked(cost, gamma, x_lengths, y_lengths, starts, impl)
    if len(cost) == 0:
        return problem.cost.sum(dim=(1, 2))
    value: Tensor
    if torch.is_grad_enabled() and cost.requires_grad:
        value = _SoftDtw.apply(problem.cost, problem)  # type: ignore[no-untyped-call]
        return value
    value, _ = problem.solve(keep=False)
    return value


def expected_alignment(
    cost: Float[Tensor, "batch n width"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
    starts: Int[Tensor, "batch n"],
    impl: str = "auto",
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch n width"]]:
    """Compute Soft-DTW of a band together with its gradient, both as constants. The arguments are those of `soft_dtw`."""
    return _checked(cost.detach(), gamma, x_lengths, y_lengths, starts, impl).solve(keep=True)


class _Problem(NamedTuple):
    """Checked arguments of a kernel."""

    kernel: Callable[..., Any]
    cost: Tensor
    gamma: float
    x_lengths: Tensor
    y_lengths: Tensor
    starts: Tensor | None

    def solve(self, keep: bool) -> tuple[Tensor, Tensor]:
        value: Tensor
        value, grad = self.kernel(self.cost, self.gamma, self.x_lengths, self.y_lengths, keep, self.starts)
        return value, grad


def _checked(
    cost: Tensor, gamma: float, x_lengths: Tensor | None, y_lengths: Tensor | None, starts: Tensor | None, impl: str
) -> _Problem:
    gamma = float(gamma)
    if not 0 < gamma < math.inf:
        raise ValueError(f"soft_dtw: gamma must be positive and finite, got {gamma}")
    is_interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # by tests
    has_triton = cost.device.type == "cuda" or is_interpreted
    unmet = {
        "cpu": None if cost.device.type == "cpu" else f"tensors on the CPU, got one on {cost.device}",
        "triton": None if has_triton else f"tensors on a GPU, got one on {cost.device}",
    }
    solve = module_of("soft_dtw", resolve("soft_dtw", impl, unmet, PREFERRED)).solve
    x_lengths = _checked_lengths("x_lengths", x_lengths, cost, cost.shape[1])
    longest = cost.shape[2] if starts is None else int(starts.max()) + cost.shape[2]
    y_lengths = _checked_lengths("y_lengths", y_lengths, cost, longest)
    if starts is not None:
        require_band(starts, x_lengths, y_lengths, cost.shape[2])
    return _Problem(solve, cost.to(torch.promote_types(cost.dtype, torch.float32)), gamma, x_lengths, y_lengths, starts)


class _SoftDtw(torch.autograd.Function):
    """Store the gradient, which the kernels compute together with the value."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: _Problem) -> Tensor:
        value, grad = problem.solve(keep=True)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_value[:, None, None], None


def _checked_lengths(
    name: str, lengths: Int[Tensor, " batch"] | None, cost: Tensor, longest: int
) -> Int[Tensor, " batch"]:
    batch = len(cost)
    if lengths is None:
        lengths = torch.full((batch,), longest, device=cost.device)
    if lengths.shape != (batch,):
        raise ValueError(f"soft_dtw: {name} must have shape ({batch},), got {tuple(lengths.shape)}")
    if lengths.device.type != "cuda":  # on a GPU, the check would make the host wait
        for row, length in enumerate(lengths.tolist()):
            if not 1 <= length <= longest:
                allowed = f"from 1 to {longest}, the size of the cost"
                raise ValueError(f"soft_dtw: {name}[{row}] must be {allowed}, got {length}")
    return lengths.to(cost.device)
