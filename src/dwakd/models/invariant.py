"""Compute hidden states that are bit-identical whatever other sequences are in the batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dwakd.batch import TokenBatch
from dwakd.models.rows import final_states

_GROUP_TOKENS = 128
"""Number of tokens, padding included, in a group of short sequences. Fewer tokens make matrix products slow on a CPU."""
_WIDTHS = (32, 48, 64)
"""Lengths to which short sequences are padded. Longer sequences run alone, without padding."""


def teacher_states(
    model: nn.Module, tokens: TokenBatch, *, attention: bool = False
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
    """Compute `response_states` of a batch, concatenated over its examples."""
    sequences = [ids[:length] for ids, length in zip(tokens.input_ids, tokens.num_tokens, strict=True)]
    found = response_states(model, sequences, tokens.num_rows, attention=attention)
    weights = [weights for _, weights in found if weights is not None]
    return torch.cat([hidden for hidden, _ in found]), torch.cat(weights) if weights else None


def response_hidden(model: nn.Module, sequences: Sequence[Tensor], num_rows: Sequence[int]) -> list[Tensor]:
    """Compute the hidden states of `response_states`, without attention."""
    return [hidden for hidden, _ in response_states(model, sequences, num_rows)]


def response_states(
    model: nn.Module, sequences: Sequence[Tensor], num_rows: Sequence[int], *, attention: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute final hidden states of the last positions of each sequence, and the attention to these positions.

    On a CPU, the result for a sequence is the same to the last bit whatever the other sequences are, because the shape in
    which a sequence runs depends only on its own length. In other shapes, attention and matrix products round differently
    (by 1e-6 in float32). On an accelerator, all sequences run in one padded batch. No gradient is computed.

    Args:
        model: a causal language model in eval mode.
        sequences: token ids of each sequence, one-dimensional.
        num_rows: number of positions to keep of each sequence, counted from its end.
        attention: whether to compute the attention, which is None otherwise.
    """
    lengths = [len(sequence) for sequence in sequences]
    rows: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * len(lengths)
    for members, size, width in _groups(model, lengths):
        ids = sequences[0].new_zeros(size, width)
        seen = torch.zeros_like(ids)
        seen[:, 0] = 1  # rows that no sequence fills have one token
        for place, member in enumerate(members):
            ids[place, : lengths[member]] = sequences[member]
            seen[place, : lengths[member]] = 1
        with torch.no_grad():
            hidden, weights = final_states(model, ids, seen, attention=attention)
        for place, member in enumerate(members):
            kept = place, slice(lengths[member] - num_rows[member], lengths[member])
            rows[member] = hidden[kept].clone(), None if weights is None else weights[kept].clone()
    return rows


def _groups(model: nn.Module, lengths: list[int]) -> list[tuple[list[int], int, int]]:
    """Return, for each batch to run, the indices of its sequences, its number of sequences and its length."""
    if next(model.parameters()).device.type != "cpu":
        return [(list(range(len(lengths))), len(lengths), max(lengths))]
    groups = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WIDTHS[-1]  # type: ignore[operator, union-attr]
    below = 0
    for width in _WIDTHS:
        fitting = [member for member, length in enumerate(lengths) if below < length <= width]
        size = _GROUP_TOKENS // width
        groups += [(fitting[i : i + size], size, min(width, positions)) for i in range(0, len(fitting), size)]
        below = width
    return groups + [([member], 1, length) for member, length in enumerate(lengths) if length > below]
