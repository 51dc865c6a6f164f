"""Soft-DTW of a ragged batch: one differentiable function over several kernels."""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.usable import is_usable

IMPLS = ("auto", "naive", "cpu", "triton")
_NEEDS = {"cpu": "numba", "triton": "triton"}


def soft_dtw(
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    x_lengths: Int[Tensor, " batch"] | None = None,
    y_lengths: Int[Tensor, " batch"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, " batch"]:
    """The soft minimum over all monotone alignments of the alignment's summed cost, for each example.

    s = R[x_length - 1, y_length - 1], R[i, j] = cost[i, j] + softmin(R[i - 1, j], R[i, j - 1], R[i - 1, j - 1]),
    softmin(a) = -gamma log sum exp(-a / gamma).

    Below every alignment's cost, and often negative: with zero costs it is -gamma log of the number of alignments.
    Cells beyond an example's lengths may hold anything, NaN included, and get zero gradient.

    Args:
        cost: pairwise costs; carries gradient, once (there is no double backward). +inf forbids a cell. NaN or -inf
            within the lengths gives NaN. Half precision is computed in float32.
        gamma: temperature of the soft minimum, in units of cost, tried from 1e-3 to 1e4. Towards 0 the result is
            that of hard DTW.
        x_lengths: rows per example, 1 to n; all n when None.
        y_lengths: columns per example, 1 to m; all m when None.
        impl: "auto", "naive" (plain torch, any device), "cpu" (compiled by numba, for CPU tensors) or "triton" (for
            CUDA tensors). "auto" takes the compiled one where it can run; a fallback is logged once.

    Returns:
        One value per example, in the costs' unit and in float32 or better; +inf with zero gradient where no path of
        finite cost exists. The gradient of a cell is the probability that a path drawn by weight exp(-cost / gamma)
        passes through it.

    Raises:
        ValueError: gamma not positive and finite, a length outside its range, an unknown impl, or "cpu" for a
            tensor on another device. Lengths on a GPU are not waited for: a wrong one there gives NaN.
        ImportError: the named impl needs numba or triton, and it cannot be imported.

    References:
        Cuturi and Blondel 2017, Soft-DTW: a Differentiable Loss Function for Time-Series, algorithms 1 and 2.

    Examples:
        >>> cost = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]])
        >>> round(soft_dtw(cost, gamma=1.0).item(), 4)
        0.2329
    """
    gamma = float(gamma)
    if not 0 < gamma < math.inf:
        raise ValueError(f"soft_dtw: gamma must be positive and finite, got {gamma}.")
    x_lengths = _checked_lengths("x_lengths", x_lengths, cost, 1)
    y_lengths = _checked_lengths("y_lengths", y_lengths, cost, 2)
    chosen = _resolve(impl, cost.device)
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    if len(cost) == 0:
        return cost.sum(dim=(1, 2))
    solve = _kernel(chosen)
    if torch.is_grad_enabled() and cost.requires_grad:
        value: Tensor = _SoftDtw.apply(solve, cost, gamma, x_lengths, y_lengths)  # type: ignore[no-untyped-call]
        return value
    return solve(cost, gamma, x_lengths, y_lengths, keep=False)[0]


class _SoftDtw(torch.autograd.Function):
    """The kernels return the gradient with the value: it is cheapest then, and one number per cell is kept."""

    @staticmethod
    def forward(
        ctx: Any, solve: Callable[..., Any], cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor
    ) -> Tensor:
        value: Tensor
        value, grad = solve(cost, gamma, x_lengths, y_lengths, keep=True)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[None, Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return None, grad * grad_value[:, None, None], None, None, None


def _resolve(impl: str, device: torch.device) -> str:
    """The kernel that runs: the one place that decides."""
    if impl not in IMPLS:
        raise ValueError(f"soft_dtw: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}.")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"soft_dtw: impl 'cpu' takes tensors on the CPU, got one on {device}; use impl='auto'.")
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"soft_dtw: impl 'triton' takes tensors on a GPU, got one on {device}; use impl='auto'.")
    if impl == "auto":
        compiled = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
        return compiled if compiled and _is_usable(compiled) else "naive"
    return impl


def _is_usable(impl: str) -> bool:
    return is_usable(f"{__name__}.{impl}", _NEEDS[impl], "soft_dtw runs in plain torch, several times slower")


@functools.cache
def _kernel(impl: str) -> Callable[..., Any]:
    """`solve` of one of the modules, imported when it is used: numba takes half a second."""
    solve: Callable[..., Any] = importlib.import_module(f"{__name__}.{impl}").solve
    return solve


def _checked_lengths(name: str, lengths: Int[Tensor, " batch"] | None, cost: Tensor, dim: int) -> Int[Tensor, " batch"]:
    batch, longest = len(cost), cost.shape[dim]
    if lengths is None:
        lengths = torch.full((batch,), longest, device=cost.device)
    if lengths.shape != (batch,):
        raise ValueError(f"soft_dtw: expects {name} of shape ({batch},), got {tuple(lengths.shape)}.")
    if lengths.device.type != "cuda":  # there the check would make the host wait
        for row, length in enumerate(lengths.tolist()):
            if not 1 <= length <= longest:
                raise ValueError(
                    f"soft_dtw: {name}[{row}] is {length}, but lengths must be 1 to {longest}, the cost's size."
                )
    return lengths.to(cost.device)
