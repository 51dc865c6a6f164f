"""Compute the distance of two distributions over different vocabularies, rank by rank, with its gradient."""

import importlib
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.sorted_distance.naive import sorted_distance_naive
from dwakd.kernels.usable import is_usable

IMPLS = ("auto", "naive", "cpu")


def sorted_distance(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"], *, impl: str = "auto"
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Compute the L1 distance of the sorted values of each row, sum_i |p_(i) - q_(i)|, and its gradient in p.

    p_(i) is the i-th largest value of p. The shorter row is padded with zeros. The order of equal values is not
    defined, so if they meet different values of q, the gradient is one of several valid ones.

    Args:
        learned: p, at least 0. Autograd does not track it, because the gradient is returned.
        target: q, at least 0; carries no gradient.
        impl: "auto", "naive" (plain torch, any device) or "cpu" (compiled, for float32 on CPUs, ten times as fast).
            "auto" selects "cpu" if it can run; a fallback is logged once.

    Returns:
        The distances, and the gradient in p: for p_i, it is the sign of p_(k) - q_(k), where k is the rank of p_i.

    Raises:
        ValueError: `impl` is unknown, or is "cpu" for tensors that are not float32 on a CPU.

    Examples:
        >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.5, 0.15, 0.25]])
        >>> round(sorted_distance(p, q)[0].item(), 4)
        0.4
    """
    if impl not in IMPLS:
        raise ValueError(f"sorted_distance: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}")
    fits = learned.device.type == "cpu" and learned.dtype == target.dtype == torch.float32
    if impl == "cpu" and not fits:
        found = f"{learned.dtype} and {target.dtype} on {learned.device}"
        raise ValueError(f"sorted_distance: impl 'cpu' requires float32 on the CPU, got {found}: use impl='auto'")
    learned, target = learned.detach(), target.detach()
    if impl == "cpu" or (impl == "auto" and fits and _numba_works()):
        pair: tuple[Tensor, Tensor] = _cpu_module().sorted_distance_cpu(learned, target)
        return pair
    return sorted_distance_naive(learned, target)


def _numba_works() -> bool:
    return is_usable(f"{__name__}.cpu", "numba", "sorted_distance runs in plain torch, ten times slower")


def _cpu_module() -> ModuleType:
    return importlib.import_module("dwakd.kernels.sorted_distance.cpu")  # on demand: loading numba takes half a second
