"""The distance of two distributions over different vocabularies, rank by rank, with its gradient."""

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
    """sum_i |p_(i) - q_(i)| of each row, and its gradient in p.

    p_(i) is the i-th largest value of p; the shorter row is filled up with zeros. Equal values may take each other's
    place: where they meet an opposite of theirs in between, the gradient is one of several.

    Args:
        learned: p, at least 0; a constant, as the gradient is returned.
        target: q, likewise.
        impl: "auto", "naive" (plain torch, any device) or "cpu" (compiled, for float32 on CPUs, ten times as
            fast). "auto" takes "cpu" where it can run; a fallback is logged once.

    Returns:
        The distances, and of each p_i the sign of p_(k) - q_(k) at i's rank k.

    Raises:
        ValueError: an unknown impl, or "cpu" for tensors that are not float32 on a CPU.

    Examples:
        >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.5, 0.15, 0.25]])
        >>> round(sorted_distance(p, q)[0].item(), 4)
        0.4
    """
    if impl not in IMPLS:
        raise ValueError(f"sorted_distance: unknown impl {impl!r}; valid are {', '.join(map(repr, IMPLS))}.")
    fits = learned.device.type == "cpu" and learned.dtype == target.dtype == torch.float32
    if impl == "cpu" and not fits:
        raise ValueError(f"sorted_distance: impl 'cpu' takes float32 on the CPU, got {learned.dtype}; use impl='auto'.")
    learned, target = learned.detach(), target.detach()
    if impl == "cpu" or (impl == "auto" and fits and _numba_works()):
        pair: tuple[Tensor, Tensor] = _cpu_module().sorted_distance_cpu(learned, target)
        return pair
    return sorted_distance_naive(learned, target)


def _numba_works() -> bool:
    return is_usable(f"{__name__}.cpu", "numba", "sorted_distance runs in plain torch, ten times slower")


def _cpu_module() -> ModuleType:
    return importlib.import_module("dwakd.kernels.sorted_distance.cpu")  # numba takes half a second: only when used
