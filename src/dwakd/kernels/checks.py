"""Checks of values of tensors that let the host run ahead of a GPU."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def require(holds: Bool[Tensor, ""], message: str, found: Callable[[], object]) -> None:
    """Raise ValueError unless `holds`; a GPU is not waited for, but stops by itself and prints the message.

    Args:
        holds: on the device of what is checked.
        message: what is expected.
        found: what was found instead; called only where `holds` may be read.
    """
    try:
        torch._assert_async(holds, message)
    except RuntimeError as error:  # at once on a CPU, and from devices that cannot assert
        if not holds:
            raise ValueError(f"{message}, got {found()}") from error


def require_targets(name: str, targets: Int[Tensor, " tokens"], vocab_size: int) -> None:
    """Raise ValueError, or stop a GPU, unless all targets are tokens of a head."""
    valid = (targets >= 0) & (targets < vocab_size)
    require(
        valid.all(),
        f"{name} must be token ids from 0 to {vocab_size - 1}, of rows that have a target: "
        "leave out the rows that are labelled -100",
        lambda: int(targets[~valid][0]),
    )
