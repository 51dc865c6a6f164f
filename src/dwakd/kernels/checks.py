"""Validate values of tensors without waiting for a GPU."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def require(holds: Bool[Tensor, ""], message: str, found: Callable[[], object]) -> None:
    """Raise ValueError unless `holds` is true. On a GPU, a device-side assertion fails with the message instead.

    The host does not wait for the GPU. `message` says which values are allowed, and `found` returns the invalid one. It
    is called only where this does not stop the host.
    """
    try:
        torch._assert_async(holds, message)
    except RuntimeError as error:  # on a CPU, and on devices without assertions
        if not holds:
            raise ValueError(f"{message}, got {found()}") from error


def require_targets(name: str, targets: Int[Tensor, " tokens"], vocab_size: int) -> None:
    """Raise ValueError unless all targets are token ids of the vocabulary; see `require` for GPUs."""
    valid = (targets >= 0) & (targets < vocab_size)
    message = f"{name} must be token ids from 0 to {vocab_size - 1} (remove the positions that are labelled -100)"
    require(valid.all(), message, lambda: int(targets[~valid][0]))
