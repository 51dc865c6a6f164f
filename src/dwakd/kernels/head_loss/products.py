"""Multiply an output head with the hidden states of a chunk, in one reused buffer."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss.statistics import forbidden_logit

ALIGNED = 16
"""The number of tokens in a product is rounded up to a multiple of this. Rows of logits then begin at a cache line;
otherwise a product takes 10 to 20 % longer."""


class HeadProducts:
    """Compute the logits of one or more sides that share a head, and return the gradients from them.

    The buffer has the shape (vocab, tokens). On CPUs, `weight @ hidden.T` takes two thirds of the time of
    `hidden @ weight.T`. The tokens of several sides form one product, and a block of the vocabulary is contiguous.
    `rows` is the number of tokens in the largest chunk, over all sides.
    """

    def __init__(self, head: OutputHead, rows: int, *, with_gradient: bool) -> None:
        self.head = head
        self.dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self.buffer = _room((rows + -rows % ALIGNED) * head.vocab_size, self.dtype, head.weight.device)
        keep_slope = head.soft_cap is not None and with_gradient
        self.slope_buffer = torch.empty_like(self.buffer) if keep_slope else None

    @staticmethod
    def row_bytes(head: OutputHead) -> int:
        """Return the bytes per token of logits, including a soft cap's slope and a half-precision copy."""
        width = torch.promote_types(head.weight.dtype, torch.float32).itemsize
        copies = width * (1 if head.soft_cap is None else 2)
        return head.vocab_size * (copies + (head.weight.itemsize if head.weight.itemsize < width else 0))

    def logits(self, hidden: Sequence[Float[Tensor, "_ hidden"]]) -> list[Float[Tensor, "_ vocab"]]:
        """Compute the logits of each side; they are views of the buffer, and the next call overwrites them."""
        head = self.head
        lengths = [len(rows) for rows in hidden]
        rest = -sum(lengths) % ALIGNED
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
            self.filled.div_(head.soft_cap).tanh_()
            if self.slope_buffer is not None:
                self.slope = self.slope_buffer[: self.filled.numel()].view_as(self.filled)
                torch.mul(self.filled, self.filled, out=self.slope).neg_().add_(1.0)
            self.filled.mul_(head.soft_cap)
        return [columns.t() for columns in torch.split(self.filled, [*lengths, rest], dim=1)[:-1]]

    def pull_back(self, count: int) -> tuple[Float[Tensor, "vocab _"], Float[Tensor, "_ hidden"]]:
        """Return the gradient of the logits before the soft cap for the first `count` tokens, and their scaled states."""
        gradient = self.filled[:, :count]
        if self.slope_buffer is not None:
            gradient.mul_(self.slope[:, :count])
        return gradient.to(self.head.weight.dtype), self.scaled[:count]


def _room(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " size"]:
    """Allocate uninitialised memory that begins at a cache line and, on CPUs, uses huge pages.

    numpy requests huge pages. Without them, the first access to the memory takes a tenth of a product's time.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    count, line = size * dtype.itemsize, 64
    memory = np.empty(count + line, np.uint8)
    start = -memory.ctypes.data % line
    return torch.from_numpy(memory[start : start + count]).view(dtype)
