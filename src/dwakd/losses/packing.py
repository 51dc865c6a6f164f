"""Conversions between tokens packed over the examples and one padded matrix per example."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def example_ids(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the example of each packed token."""
    index = torch.arange(lengths.shape[0], device=lengths.device)
    return index.repeat_interleave(lengths, output_size=num_tokens)


def positions(lengths: Int[Tensor, " batch"], num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the position of each packed token in its example, from 0."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(num_tokens, device=lengths.device) - starts[example_ids(lengths, num_tokens)]


def pad_rows(
    rows: Float[Tensor, "tokens width"], lengths: Int[Tensor, " batch"], length: int
) -> Float[Tensor, "batch length width"]:
    """Unpack vectors into one zero-padded matrix per example; differentiable."""
    tokens = rows.shape[0]
    padded = rows.new_zeros(lengths.shape[0], length, rows.shape[1])
    return padded.index_put((example_ids(lengths, tokens), positions(lengths, tokens)), rows)


def unpad_rows(
    padded: Float[Tensor, "batch length width"], lengths: Int[Tensor, " batch"], num_tokens: int
) -> Float[Tensor, "tokens width"]:
    """Pack padded matrices: the inverse of `pad_rows`; differentiable."""
    return padded[example_ids(lengths, num_tokens), positions(lengths, num_tokens)]


def valid(lengths: Int[Tensor, " batch"], length: int) -> Bool[Tensor, "batch length"]:
    """Return a mask that is True at the positions of a padded matrix that hold a token."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]
