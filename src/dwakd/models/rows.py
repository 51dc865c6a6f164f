"""Run a model on a batch and select the response positions that a loss reads (`ModelSide`).

Only the backbone runs over the whole batch. No product with the vocabulary is computed here.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.errors import UserError
from dwakd.models.checks import check_head
from dwakd.models.head import causal_lm, evaluating, final_hidden, table_and_head

__all__ = ["check_head", "evaluating", "final_hidden", "last_layer", "response_side", "select_side", "teacher_states"]

_GROUP_TOKENS = 128  # tokens, padding included, in a group of short sequences; fewer are slow on a CPU
_WIDTHS = (32, 48, 64)  # lengths to which short sequences are padded; longer ones run alone, without padding


_UNKNOWN_TERMS = ("s_aux", "sinks", "position_bias")  # arguments that add terms to the attention scores


class LastLayer:
    """Queries and keys of the last call of an attention function, which is the call of the model's last layer."""

    call: tuple[Tensor, Tensor, Any, dict[str, Any]] | None = None

    @torch.no_grad()
    def row(self, last: Int[Tensor, " batch"]) -> Float[Tensor, "batch length"]:
        """Compute the attention weights of the position `last` of each sequence, summed over the heads, without gradient.

        A model that does not use transformers' attention functions, or adds other terms to the scores, is refused.
        """
        if self.call is None or any(self.call[3].get(name) is not None for name in _UNKNOWN_TERMS):
            fix = "set loss.span_weights=uniform, which needs no attention"
            raise UserError(f"the attention of a model cannot be read (unsupported attention function); {fix}")
        queries, keys, mask, options = self.call
        rows, places = torch.arange(len(last), device=last.device), torch.arange(keys.shape[2], device=last.device)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        keys = keys.to(dtype).repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = (keys @ queries[rows, :, last].to(dtype)[..., None]).squeeze(-1)
        scores = scores * (options.get("scaling") or keys.shape[-1] ** -0.5)
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        window = options.get("sliding_window") or len(places)
        unseen = (places > last[:, None]) | (places <= last[:, None] - window)
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask.expand(len(rows), -1, -1, -1)[rows, :, last]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).sum(1)


@contextlib.contextmanager
def last_layer(config: PretrainedConfig) -> Iterator[LastLayer]:
    """Record queries and keys of the last attention call of a model, given its text config, inside a `with` block."""
    name, noted = config._attn_implementation, LastLayer()
    usual = ALL_ATTENTION_FUNCTIONS.get(name)

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        noted.call = query.detach(), key.detach(), attention_mask, options
        # eager functions are not in the registry; they are defined in the module of their model
        run = usual or sys.modules[type(module).__module__].eager_attention_forward
        return run(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = note
    try:
        yield noted
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def final_states(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
    *,
    attention: bool,
    packed: bool = False,
) -> tuple[Float[Tensor, "batch length hidden"], Float[Tensor, "batch length"] | None]:
    """Compute `final_hidden` and, if `attention` is true, `ModelSide.attention` of every position (otherwise None).

    A `packed` batch has no attention.
    """
    if not attention:
        return final_hidden(model, input_ids, attention_mask, packed=packed), None
    with last_layer(causal_lm(model).config.get_text_config()) as recorded:
        hidden = final_hidden(model, input_ids, attention_mask)
    return hidden, recorded.row(attention_mask.sum(1) - 1)


def response_side(model: nn.Module, tokens: TokenBatch, *, attention: bool = False, packed: bool = False) -> ModelSide:
    """Run a model that is trained, and select the response positions of the batch.

    Gradient reaches the model through `hidden`, `target_embeddings` and `head`. With `attention`, the side has attention.
    `packed` is that of `final_hidden`.
    """
    hidden, weights = final_states(model, tokens.input_ids, tokens.attention_mask, attention=attention, packed=packed)
    places = response_places(tokens)
    weights = None if weights is None else weights.flatten()[places]
    return select_side(tokens, hidden.flatten(0, 1)[places], weights, *table_and_head(model))


def teacher_states(
    model: nn.Module, tokens: TokenBatch, *, attention: bool = False, packed: bool = False
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
    """Compute `response_states` of a batch, concatenated over its examples."""
    sequences = [ids[:length] for ids, length in zip(tokens.input_ids, tokens.num_tokens, strict=True)]
    found = response_states(model, sequences, tokens.num_rows, attention=attention, packed=packed)
    weights = [weights for _, weights in found if weights is not None]
    return torch.cat([hidden for hidden, _ in found]), torch.cat(weights) if weights else None


def response_hidden(model: nn.Module, sequences: Sequence[Tensor], num_rows: Sequence[int]) -> list[Tensor]:
    """Compute the hidden states of `response_states`, without attention."""
    return [hidden for hidden, _ in response_states(model, sequences, num_rows)]


def response_states(
    model: nn.Module,
    sequences: Sequence[Tensor],
    num_rows: Sequence[int],
    *,
    attention: bool = False,
    packed: bool = False,
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute final hidden states of the last positions of each sequence, and the attention to these positions.

    On a CPU, the result for a sequence is the same to the last bit whatever the other sequences are, because the shape in
    which a sequence runs depends only on its own length. In other shapes, attention and matrix products round differently
    (by 1e-6 in float32). On an accelerator, and if the model is sharded, all sequences run in one padded batch. No gradient
    is computed.

    Args:
        model: a causal language model in eval mode.
        sequences: token ids of each sequence, one-dimensional.
        num_rows: number of positions to keep of each sequence, counted from its end.
        attention: whether to compute the attention, which is None otherwise.
        packed: whether an accelerator runs the sequences as one sequence, as in `final_hidden`.
    """
    packed = packed and next(model.parameters()).device.type != "cpu"
    lengths = [len(sequence) for sequence in sequences]
    rows: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * len(lengths)
    for members, size, width in _groups(model, lengths):
        ids = sequences[0].new_zeros(size, width)
        seen = torch.zeros_like(ids)
        seen[:, 0] = 1  # unused rows of the batch get one token
        for place, member in enumerate(members):
            ids[place, : lengths[member]] = sequences[member]
            seen[place, : lengths[member]] = 1
        with torch.no_grad():
            hidden, weights = final_states(model, ids, seen, attention=attention, packed=packed)
        for place, member in enumerate(members):
            kept = place, slice(lengths[member] - num_rows[member], lengths[member])
            rows[member] = hidden[kept].clone(), None if weights is None else weights[kept].clone()
    return rows


def _groups(model: nn.Module, lengths: list[int]) -> list[tuple[list[int], int, int]]:
    """Return, for each batch to run, the indices of its sequences, its number of sequences and its length."""
    first = next(model.parameters())
    if first.device.type != "cpu" or hasattr(first, "full_tensor"):  # all ranks run a sharded model equally often
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
