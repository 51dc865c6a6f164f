"""Run a model on a batch and select the response positions that a loss reads (`ModelSide`).

Only the backbone runs over the whole batch. No product with the vocabulary is computed here.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.models.attention import last_layer
from dwakd.models.checks import check_head
from dwakd.models.head import causal_lm, embedding_table, evaluating, final_hidden, output_head

__all__ = [
    "check_head",
    "evaluating",
    "final_hidden",
    "response_side",
    "response_states",
    "select_side",
    "teacher_states",
]

_GROUP_TOKENS = 128
"""Number of tokens, padding included, in a group of short sequences. Fewer tokens make matrix products slow on a CPU."""
_WIDTHS = (32, 48, 64)
"""Lengths to which short sequences are padded. Longer sequences run alone, without padding."""


def final_states(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
    *,
    attention: bool,
) -> tuple[Float[Tensor, "batch length hidden"], Float[Tensor, "batch length"] | None]:
    """Compute `final_hidden` and, if `attention` is true, `ModelSide.attention` of every position (otherwise None)."""
    if not attention:
        return final_hidden(model, input_ids, attention_mask), None
    with last_layer(causal_lm(model).config.get_text_config()) as recorded:
        hidden = final_hidden(model, input_ids, attention_mask)
    return hidden, recorded.row(attention_mask.sum(1) - 1)


def response_side(model: nn.Module, tokens: TokenBatch, *, attention: bool = False) -> ModelSide:
    """Run a model that is trained, and select the response positions of the batch.

    Gradient reaches the model through `hidden`, `target_embeddings` and `head`. With `attention`, the side has attention.
    """
    hidden, weights = final_states(model, tokens.input_ids, tokens.attention_mask, attention=attention)
    places = response_places(tokens)
    weights = None if weights is None else weights.flatten()[places]
    return select_side(tokens, hidden.flatten(0, 1)[places], weights, embedding_table(model), output_head(model))


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


def select_side(
    tokens: TokenBatch,
    hidden: Float[Tensor, "tokens hidden"],
    attention: Float[Tensor, " tokens"] | None,
    table: Float[Tensor, "vocab embedding"],
    head: OutputHead,
) -> ModelSide:
    """Combine the hidden states and the attention of the response positions with their tokens.

    `table` is the model's input-embedding table. Table and head are detached for a teacher.
    """
    places = response_places(tokens)
    targets = tokens.target_ids.flatten()[places]
    return ModelSide(
        hidden=hidden,
        input_embeddings=table.detach()[tokens.input_ids.flatten()[places]],
        target_embeddings=nn.functional.embedding(targets, table),
        target_ids=targets,
        lengths=tokens.response_mask.sum(dim=1),
        byte_ends=tokens.byte_ends.flatten()[places],
        head=head,
        aligned_rows=tokens.aligned_rows,
        attention=attention,
        num_rows=tokens.num_rows,
    )


def response_places(tokens: TokenBatch) -> Int[Tensor, " tokens"]:
    """Return the indices of the response positions in the flattened batch, without waiting for the device."""
    return tokens.response_mask.flatten().logical_not().byte().argsort(stable=True)[: sum(tokens.num_rows)]
