"""The last linear map of a language model, with whatever its architecture does to the logits."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class OutputHead:
    """Maps final hidden states to next-token logits.

    logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = soft_cap * tanh(x / soft_cap).

    Args:
        weight: the LM head, tied or not; gradient flows unless `detached()` was called.
        bias: added before scaling, or None.
        scale: factor on the logits (Cohere, Granite).
        soft_cap: bound of the tanh (Gemma 2), or None.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding rows included (Qwen's heads are wider than their tokenizers)."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def forbidden(self) -> Bool[Tensor, " vocab"]:
        """Tokens whose probability is 0 in every context, by a bias of -inf."""
        if self.bias is None:
            return torch.zeros(self.vocab_size, dtype=torch.bool, device=self.weight.device)
        return self.bias.detach().isneginf()

    @property
    def num_possible(self) -> int | Int[Tensor, ""]:
        """Rows of the head that are not forbidden; a tensor where there is a bias, so that no device is waited for."""
        return self.vocab_size if self.bias is None else (~self.forbidden).sum()

    def detached(self) -> "OutputHead":
        """The same head as a constant: gradient passes through to the hidden states only."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def of_tokens(self, ids: Int[Tensor, " tokens"]) -> "OutputHead":
        """The head of these tokens alone; gradient flows back to the whole."""
        bias = None if self.bias is None else self.bias.index_select(0, ids)
        return replace(self, weight=self.weight.index_select(0, ids), bias=bias)

    def to(self, device: torch.device) -> "OutputHead":
        """The same head on another device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Next-token logits in float32 or better, whatever the dtype of the product."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits
