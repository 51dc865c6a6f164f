"""The output head of a language model: its last linear map, and the scaling and capping of its logits."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class OutputHead:
    """Map final hidden states to next-token logits.

    logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = soft_cap * tanh(x / soft_cap).

    Args:
        weight: weight of the LM head, tied to the input embeddings or not. Gradient flows into it, except in a head that
            `detached()` returns.
        bias: added before scaling, or None.
        scale: factor of the logits (Cohere, Granite).
        soft_cap: bound of the logits (Gemma 2), or None for no bound.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Number of vocab entries of the head, padding included (Qwen's heads have more entries than their tokenizers)."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the head reads."""
        return self.weight.shape[1]

    @property
    def forbidden(self) -> Bool[Tensor, " vocab"]:
        """Mask of the vocab entries whose probability is always 0 because their bias is -inf."""
        if self.bias is None:
            return torch.zeros(self.vocab_size, dtype=torch.bool, device=self.weight.device)
        return self.bias.detach().isneginf()

    @property
    def num_possible(self) -> int | Int[Tensor, ""]:
        """Number of vocab entries that are not forbidden. A tensor if there is a bias, to avoid waiting for the device."""
        return self.vocab_size if self.bias is None else (~self.forbidden).sum()

    def detached(self) -> "OutputHead":
        """Return this head as a constant: gradient flows into the hidden states but not into weight and bias."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def of_tokens(self, ids: Int[Tensor, " tokens"]) -> "OutputHead":
        """Return a head with only these vocab entries. Gradient flows into the full weight and bias."""
        bias = None if self.bias is None else self.bias.index_select(0, ids)
        return replace(self, weight=self.weight.index_select(0, ids), bias=bias)

    def to(self, device: torch.device) -> "OutputHead":
        """Return this head on another device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Compute next-token logits. They are float32 or float64, whatever the dtype of the weight."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits
