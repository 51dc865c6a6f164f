"""Compute the distance of two distributions over different vocabularies, rank by rank, with its gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.dispatch import module_of, resolve


def sorted_distance(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"], *, impl: str = "auto"
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Compute the L1 distance of the sorted values of each row, sum_i |p_(i) - q_(i)|, and its gradient in p.

    p_(i) is the i-th largest value of p. The shorter row is padded with zeros. The order of equal values is not
    defined, so if they meet different values of q, the gradient is one of several valid ones.

    Args:
        learned: p, at least 0. Autograd does not track it, because the gradient is returned.
        target: q, at least 0; carries no gradient.
        impl: "auto", "naive" (plain torch, any device) or "cpu" (compiled, for float32 on CPUs, several times as fast).
            "auto" selects "cpu" if it can run; a fallback is logged once.

    Returns:
        The distances, and the gradient in p: for p_i, it is the sign of p_(k) - q_(k), where k is the rank of p_i.

    Raises:
        ValueError: `impl` is unknown, or is "cpu" for tensors that are not float32 on a CPU; or the numbers of rows differ.

    Examples:
        >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.5, 0.15, 0.25]])
        >>> round(sorted_distance(p, q)[0].item(), 4)
        0.4
    """
    fits = learned.device.type == "cpu" and learned.dtype == target.dtype == torch.float32
    unmet = None if fits else f"float32 on the CPU, got {learned.dtype} and {target.dtype} on {learned.device}"
    if len(learned) != len(target):
        raise ValueError(f"sorted_distance: {len(learned)} rows of p, but {len(target)} of q")
    learned, target = learned.detach(), target.detach()
    if resolve("sorted_distance", impl, {"cpu": unmet}, ["cpu"]) == "naive":
        return _naive(learned, target)
    pair: tuple[Tensor, Tensor] = module_of("sorted_distance", "cpu").sorted_distance_cpu(learned, target)
    return pair


def _naive(
    learned: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows other_vocab"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Compute the distances in plain torch for any device and dtype: the specification of the compiled kernel."""
    descending, order = learned.sort(-1, descending=True)
    opposite = target.sort(-1, descending=True).values
    width = max(descending.shape[1], opposite.shape[1])
    descending, opposite = (
        torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (descending, opposite)
    )
    gap = descending - opposite
    return gap.abs().sum(-1), torch.empty_like(learned).scatter_(-1, order, gap[:, : learned.shape[1]].sign())
