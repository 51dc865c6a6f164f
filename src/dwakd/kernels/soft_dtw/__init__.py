"""Soft-DTW of a ragged batch: one differentiable function over several kernels."""

import functools
import importlib
import logging
import math
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.kernels.soft_dtw.naive import soft_dtw_naive

logger = logging.getLogger(__name__)

IMPLS = ("auto", "naive", "cpu")


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
        impl: "auto", "naive" (plain torch, any device) or "cpu" (compiled, for CPU tensors). "auto" takes "cpu"
            where it can run; a fallback is logged once.

    Returns:
        One value per example, in the costs' unit and in float32 or better; +inf with zero gradient where no path of
        finite cost exists. The gradient of a cell is the probability that a path drawn by weight exp(-cost / gamma)
        passes through it.

    Raises:
        ValueError: gamma not positive and finite, a length outside its range, an unknown impl, or "cpu" for a
            tensor on another device.
        ImportError: impl is "cpu" and numba cannot be imported.

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
    batch, n, m = cost.shape
    x_lengths = _checked_lengths("x_lengths", x_lengths, batch, n)
    y_lengths = _checked_lengths("y_lengths", y_lengths, batch, m)
    chosen = _resolve(impl, cost.device)
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    if batch == 0:
        return cost.sum(dim=(1, 2))
    if chosen == "cpu":
        value: Tensor = _cpu_module().soft_dtw_cpu(cost, gamma, torch.stack((x_lengths, y_lengths), 1).cpu().long().numpy())
        return value
    return soft_dtw_naive(cost, gamma, x_lengths.to(cost.device), y_lengths.to(cost.device))


def _resolve(impl: str, device: torch.device) -> str:
    """The kernel that runs: the one place that decides."""
    if impl not in IMPLS:
        raise ValueError(f"soft_dtw: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}.")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"soft_dtw: impl 'cpu' takes tensors on the CPU, got one on {device}; use impl='auto'.")
    if impl == "auto":  # a Triton kernel for device.type == "cuda" joins here
        return "cpu" if device.type == "cpu" and _numba_works() else "naive"
    return impl


@functools.cache
def _numba_works() -> bool:
    """Whether the compiled kernel can be imported; if not, the reason is logged, once."""
    try:
        _cpu_module()
    except ImportError as error:
        logger.warning("soft_dtw runs in plain torch, several times slower, because numba is not usable: %s", error)
        return False
    return True


def _cpu_module() -> ModuleType:
    return importlib.import_module("dwakd.kernels.soft_dtw.cpu")  # numba takes half a second: only when it is used


def _checked_lengths(
    name: str, lengths: Int[Tensor, " batch"] | None, batch: int, longest: int
) -> Int[Tensor, " batch"]:
    if lengths is None:
        lengths = torch.full((batch,), longest)
    if lengths.shape != (batch,):
        raise ValueError(f"soft_dtw: expects {name} of shape ({batch},), got {tuple(lengths.shape)}.")
    wrong = (lengths < 1) | (lengths > longest)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"soft_dtw: {name}[{row}] is {int(lengths[row])}, but lengths must be 1 to {longest}, the cost's size."
        )
    return lengths
