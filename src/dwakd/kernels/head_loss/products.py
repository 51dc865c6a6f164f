"""A head's products with the rows of a chunk, into and out of one reused buffer."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.head_loss.statistics import forbidden_logit
from dwakd.models.head import OutputHead

ALIGNED = 16
"""Products are of a multiple of so many rows: with others, rows of logits begin anywhere in a cache line, and a product
takes a tenth to a fifth more time."""


class HeadProducts:
    """Logits of the rows of one or more sides that share a head, and the gradients that come back from them.

    The buffer holds (vocab, tokens): on CPUs `weight @ hidden.T` takes two thirds of the time of `hidden @ weight.T`,
    rows of several sides stacked make one product, and a block of the vocabulary is contiguous.

    Args:
        head: of these sides.
        rows: stacked rows of the largest chunk.
        with_gradient: whether `pull_back` will be called.
    """

    def __init__(self, head: OutputHead, rows: int, *, with_gradient: bool) -> None:
        self.head = head
        self.dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self.buffer = _room(_aligned(rows) * head.vocab_size, self.dtype, head.weight.device)
        keep_slope = head.soft_cap is not None and with_gradient
        self.slope_buffer = torch.empty_like(self.buffer) if keep_slope else None

    @staticmethod
    def row_bytes(head: OutputHead) -> int:
        """Memory per row of logits, with the slope of a soft cap and the copy of a half-precision product."""
        width = torch.promote_types(head.weight.dtype, torch.float32).itemsize
        copies = width * (1 if head.soft_cap is None else 2)
        return head.vocab_size * (copies + (head.weight.itemsize if head.weight.itemsize < width else 0))

    def logits(self, hidden: Sequence[Float[Tensor, "_ hidden"]]) -> list[Float[Tensor, "_ vocab"]]:
        """Logits of each side, views of the buffer that are overwritten by the next call."""
        head = self.head
        lengths = [len(rows) for rows in hidden]
        rest = _aligned(sum(lengths)) - sum(lengths)
        self.scaled = torch.cat(
            [*(rows.to(head.weight.dtype) for rows in hidden), head.weight.new_zeros(rest, head.weight.shape[1])]
        )
        if head.scale != 1.0:
            self.scaled = self.scaled * head.scale
        self.filled = self.buffer[: len(self.scaled) * head.vocab_size].view(head.vocab_size, len(self.scaled))
        if self.dtype == head.weight.dtype:
            torch.mm(head.weight, self.scaled.t(), out=self.filled)
        else:
            self.filled.copy_(torch.mm(head.weight, self.scaled.t()))
        if head.bias is not None:
            self.filled.add_((head.bias.to(self.dtype) * head.scale)[:, None])
            self.filled.clamp_(min=forbidden_logit(self.dtype))
        if head.soft_cap is not None:
            self._cap(head.soft_cap)
        return [columns.t() for columns in torch.split(self.filled, [*lengths, rest], dim=1)[:-1]]

    def _cap(self, soft_cap: float) -> None:
        self.filled.div_(soft_cap).tanh_()
        if self.slope_buffer is not None:
            self.slope = self.slope_buffer[: self.filled.numel()].view_as(self.filled)
            torch.mul(self.filled, self.filled, out=self.slope).neg_().add_(1.0)
        self.filled.mul_(soft_cap)

    def pull_back(self, columns: slice) -> tuple[Float[Tensor, "vocab _"], Float[Tensor, "_ hidden"]]:
        """The gradient that a criterion left in these columns, before the soft cap, and the rows it belongs to."""
        gradient = self.filled[:, columns]
        if self.slope_buffer is not None:
            gradient.mul_(self.slope[:, columns])
        return gradient.to(self.head.weight.dtype), self.scaled[columns]


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNED) * ALIGNED


def _room(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " size"]:
    """Uninitialised memory, at the start of a cache line; on CPUs in huge pages.

    numpy asks for them. The first touch of as much memory from torch takes a tenth of a product's time.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    count, line = size * dtype.itemsize, 64
    memory = np.empty(count + line, np.uint8)
    start = -memory.ctypes.data % line
    return torch.from_numpy(memory[start : start + count]).view(dtype)
