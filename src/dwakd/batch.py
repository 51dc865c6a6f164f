"""Inputs and outputs of a loss: the response positions of a batch, concatenated over its examples.

Axes: `batch` is the number of examples, `tokens` the number of response positions of all examples, one example after
the other, `hidden` the width of the final hidden states, `embedding` the width of the input embeddings, and `vocab`
the number of logits of the head. The prefixes `s_` and `t_` mean student and teacher where both occur. A response
position is a position whose *predicted* token belongs to the response, the end-of-sequence token included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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


@dataclass(frozen=True)
class ModelSide:
    """What one model, the student or a teacher, computed for a batch.

    Args:
        hidden: final hidden states, which are the input of the head. The student's carry gradient.
        input_embeddings: embedding of the token that the model reads at each position. Constant.
        target_embeddings: embedding of the token to predict at each position. The student's carry gradient.
        target_ids: id of the token to predict at each position.
        lengths: number of response positions of each example, at least 1. They sum to `tokens`.
        byte_ends: offset at which the predicted token ends in the UTF-8 bytes of the response. For the end-of-sequence
            token this is the length of the response. The number is negative inside text that the tokenizer's
            normalisation changed, see `TextEncoder.response_ids`.
        head: maps hidden states to logits.
        aligned_rows: for each student token, the index within the example of the teacher token that is paired with it
            by spelling, or -1. Set on a teacher's side if the method needs it.
        trust: per-token gate weight divided by this teacher's mixture weight. Set on the sides of several teachers.
        attention: attention of the last position of the sequence to each response position in the last layer, summed
            over the heads. Constant. Set if the method needs it.
    """

    hidden: Float[Tensor, "tokens hidden"]
    input_embeddings: Float[Tensor, "tokens embedding"]
    target_embeddings: Float[Tensor, "tokens embedding"]
    target_ids: Int[Tensor, " tokens"]
    lengths: Int[Tensor, " batch"]
    byte_ends: Int[Tensor, " tokens"]
    head: OutputHead
    aligned_rows: Int[Tensor, " s_tokens"] | None = None
    trust: Float[Tensor, " s_tokens"] | None = None
    attention: Float[Tensor, " tokens"] | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """`lengths` as Python integers, set by `with_counts` or copied once from the device, which synchronises it."""
        return tuple(self.lengths.tolist())

    def with_counts(self, counts: Sequence[int] | None) -> "ModelSide":
        """Set `counts` to the values of `lengths` unless they are None, and return this side."""
        if counts is not None:
            vars(self)["counts"] = tuple(counts)
        return self


@dataclass(frozen=True)
class LossOutput:
    """The value of a loss and of each of its terms.

    Args:
        loss: weighted sum of the terms, in nats per student response token. Carries gradient.
        terms: unweighted, detached value of each term by its public name, in the same unit.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
