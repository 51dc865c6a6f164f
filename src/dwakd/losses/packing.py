"""Between rows packed over the examples and one padded matrix per example."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def example_ids(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """The example each packed row belongs to."""
    index = torch.arange(lengths.shape[0], device=lengths.device)
    return index.repeat_interleave(lengths, output_size=num_tokens)


def positions(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """Each packed row's place in its own example, from 0."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(num_tokens, device=lengths.device) - starts[example_ids(lengths, num_tokens)]


def pad_rows(
    rows: Float[Tensor, "tokens width"], lengths: Int[Tensor, " batch"], length: int
) -> Float[Tensor, "batch length width"]:
    """Packed rows as one zero-padded matrix per example; differentiable."""
    tokens = rows.shape[0]
    padded = rows.new_zeros(lengths.shape[0], length, rows.shape[1])
    return padded.index_put((example_ids(lengths, tokens), positions(lengths, tokens)), rows)


def unpad_rows(
    padded: Float[Tensor, "batch length width"], lengths: Int[Tensor, " batch"], num_tokens: int
) -> Float[Tensor, "tokens width"]:
    """The inverse of `pad_rows`; differentiable."""
    return padded[example_ids(lengths, num_tokens), positions(lengths, num_tokens)]


def valid(lengths: Int[Tensor, " batch"], length: int) -> Bool[Tensor, "batch length"]:
    """True at the places of a padded matrix that hold a row."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]
