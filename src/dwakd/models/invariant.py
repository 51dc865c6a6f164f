"""Hidden states that don't depend on the batch in which they were computed, to the last bit."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dwakd.models.rows import final_states

_GROUP_TOKENS = 128
"""Short sequences are run together up to this many tokens: below it a CPU's products are slow."""
_WIDTHS = (32, 48, 64)


def response_hidden(model: nn.Module, sequences: Sequence[Tensor], num_rows: Sequence[int]) -> list[Tensor]:
    """The hidden states of `response_states`."""
    return [hidden for hidden, _ in response_states(model, sequences, num_rows, attention=False)]


def response_states(
    model: nn.Module, sequences: Sequence[Tensor], num_rows: Sequence[int], *, attention: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Final hidden states of the last positions of each sequence, without gradient, and the attention to them.

    On a CPU a sequence meets the same shapes whatever its company: alone if it is long, else padded to a fixed width in
    a group of a fixed size. Attention and matrix products round differently in other shapes, by 1e-6 in float32. It
    costs nothing: there is no padding to the longest of a batch. An accelerator gets one padded batch.

    Args:
        model: a causal LM in eval mode.
        sequences: token ids, one dimension each.
        num_rows: how many positions to keep, counted from the end.
        attention: give `ModelSide.attention` too.

    Returns:
        Per sequence (num_rows, hidden) and (num_rows,) or None.
    """
    lengths = [len(sequence) for sequence in sequences]
    rows: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * len(lengths)
    for members, size, width in _groups(model, lengths):
        ids = sequences[0].new_zeros(size, width)
        seen = torch.zeros_like(ids)
        seen[:, 0] = 1  # a group may have room to spare
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
    """Members, rows and columns of each batch to run."""
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
    groups += [([member], 1, length) for member, length in enumerate(lengths) if length > below]
    return groups
