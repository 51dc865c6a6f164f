"""A batch of token ids, and the inputs and outputs of a loss: response positions, concatenated over the examples.

Axes: `batch` is the number of examples, `length` the padded number of tokens of an example, `tokens` the number of
response positions of all examples, one example after the other, `hidden` the width of the final hidden states,
`embedding` the width of the input embeddings, and `vocab` the number of logits of the head. The prefixes `s_` and `t_`
mean student and teacher where both occur. A response position is a position whose *predicted* token belongs to the
response, the end-of-sequence token included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


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
class TokenBatch:
    """Token ids of a batch for one model, padded on the right.

    Args:
        input_ids: token that the model reads at each position.
        attention_mask: 1 for tokens, 0 for padding.
        target_ids: token to predict at each position.
        response_mask: True at response positions, which are the last positions of each example.
        byte_ends: see `ModelSide`; 0 outside the response.
        num_tokens: number of tokens of each example. With `num_rows`, it need not be read from a GPU.
        num_rows: number of response positions of each example.
        aligned_rows: see `ModelSide`.
        cache_places: index of each example in the cache of its teacher, if the teacher has one.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    target_ids: Int[Tensor, "batch length"]
    response_mask: Bool[Tensor, "batch length"]
    byte_ends: Int[Tensor, "batch length"]
    num_tokens: tuple[int, ...]
    num_rows: tuple[int, ...]
    aligned_rows: Int[Tensor, " s_tokens"] | None = None
    cache_places: tuple[int, ...] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """Apply a function to each tensor."""
        fields: dict[str, Any] = {n: function(v) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **fields)

    def examples(self, places: Sequence[int], student_rows: Sequence[int]) -> "TokenBatch":
        """Return the tokens of some of the examples, without the padding that only other examples need.

        `student_rows` is the student's `num_rows` of all examples.
        """
        width = max(self.num_tokens[place] for place in places)
        fields: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                aligned = name == "aligned_rows"
                fields[name] = of_examples(value, student_rows, places) if aligned else value[list(places), :width]
            elif value is not None:
                fields[name] = tuple(value[place] for place in places)
        return replace(self, **fields)

    @staticmethod
    def concatenate(batches: "Sequence[TokenBatch]") -> "TokenBatch":
        """Return one batch with the examples of several, padded to the longest one."""
        width = max(batch.input_ids.shape[1] for batch in batches)
        fields: dict[str, Any] = {}
        for name, first in vars(batches[0]).items():
            values = [getattr(batch, name) for batch in batches]
            if isinstance(first, tuple):
                fields[name] = tuple(chain.from_iterable(values))
            elif first is not None:
                fields[name] = torch.cat([v if v.ndim == 1 else pad(v, (0, width - v.shape[1])) for v in values])
        return TokenBatch(**fields)


def of_examples(values: Tensor, lengths: Sequence[int], places: Sequence[int]) -> Tensor:
    """Return the rows of some examples, given the number of rows of each example."""
    parts = torch.split(values, list(lengths))
    return torch.cat([values[:0], *(parts[place] for place in places)])


@dataclass(frozen=True)
class PairedBatch:
    """The same examples for the student and for each teacher. Created by `dwakd.data.collator.collate` and never changed.

    Args:
        student: tokens of the student.
        teachers: tokens of each teacher.
        example_ids: index in the data set of each example.
        weight: weight in the optimiser batch: 1, or 0 if the examples only repeat those of other batches.
        num_sampled: number of examples whose responses the student sampled. They are the last ones.
        chosen: index of the only teacher of each example; None if all teachers teach all examples.
    """

    student: TokenBatch
    teachers: tuple[TokenBatch, ...]
    example_ids: tuple[int, ...]
    weight: float = 1.0
    num_sampled: int = 0
    chosen: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.example_ids)

    def __iter__(self) -> Iterator[TokenBatch]:
        """Iterate over the models, student first. (`transformers.Trainer` tests for "input_ids" in a batch.)"""
        return iter((self.student, *self.teachers))

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairedBatch":
        """Apply a function to each tensor."""
        student, *teachers = (tokens.map(function) for tokens in self)
        return replace(self, student=student, teachers=tuple(teachers))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PairedBatch":
        """Return this batch on a device. Data loaders of accelerate call it."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PairedBatch":
        """Return this batch in page-locked memory. Data loaders of torch call it."""
        return self.map(torch.Tensor.pin_memory)

    def examples(self, places: Sequence[int]) -> "PairedBatch":
        """Return some of the examples of this batch, those without sampled responses first."""
        num_given = len(self) - self.num_sampled
        places = sorted(places, key=lambda place: place >= num_given)
        student, *teachers = (tokens.examples(places, self.student.num_rows) for tokens in self)
        return replace(
            self,
            student=student,
            teachers=tuple(teachers),
            example_ids=tuple(self.example_ids[place] for place in places),
            num_sampled=sum(place >= num_given for place in places),
            chosen=self.chosen and tuple(self.chosen[place] for place in places),
        )

    @staticmethod
    def concatenate(batches: "Sequence[PairedBatch]") -> "PairedBatch":
        """Return one batch with the examples of several, those without sampled responses first."""
        student, *teachers = (TokenBatch.concatenate(models) for models in zip(*batches, strict=True))
        sampled = [n >= len(batch) - batch.num_sampled for batch in batches for n in range(len(batch))]
        whole = replace(
            batches[0],
            student=student,
            teachers=tuple(teachers),
            example_ids=tuple(chain.from_iterable(batch.example_ids for batch in batches)),
            num_sampled=0,
            chosen=batches[0].chosen and tuple(chain.from_iterable(batch.chosen or () for batch in batches)),
        )
        given_first = sorted(range(len(whole)), key=sampled.__getitem__)
        return replace(whole.examples(given_first), num_sampled=sum(sampled))


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
        gate_weights: per-token gate weight divided by this teacher's mixture weight. Set on the sides of several teachers.
        attention: attention of the last position of the sequence to each response position in the last layer, summed
            over the heads. Constant. Set if the method needs it.
        num_rows: `lengths` as Python integers, so that they need not be read from a GPU.
        sampled: whether the student sampled the responses, so that no term may train a model to predict them.
        places: indices in the batch of the examples of a teacher's side, if it has only those that it teaches.
        target_log_probs: log-probability of each of `target_ids`, if the teacher gives nothing else. Hidden states,
            embeddings and head then have width 0, and only methods with `needs_only_log_probs` can use the side.
    """

    hidden: Float[Tensor, "tokens hidden"]
    input_embeddings: Float[Tensor, "tokens embedding"]
    target_embeddings: Float[Tensor, "tokens embedding"]
    target_ids: Int[Tensor, " tokens"]
    lengths: Int[Tensor, " batch"]
    byte_ends: Int[Tensor, " tokens"]
    head: OutputHead
    aligned_rows: Int[Tensor, " s_tokens"] | None = None
    gate_weights: Float[Tensor, " s_tokens"] | None = None
    attention: Float[Tensor, " tokens"] | None = None
    num_rows: tuple[int, ...] | None = None
    sampled: bool = False
    places: tuple[int, ...] | None = None
    target_log_probs: Float[Tensor, " tokens"] | None = None

    @cached_property
    def byte_starts(self) -> Int[Tensor, " tokens"]:
        """Offset at which the predicted token starts: `byte_ends` of the token before it, 0 at the start of a response."""
        return self.byte_ends.roll(1).index_fill(0, self.lengths.cumsum(0) - self.lengths, 0)

    def examples(self, start: int, stop: int) -> "ModelSide | None":
        """Return the side of the examples start to stop of the batch; None if it has none of them."""
        own = range(len(self.counts)) if self.places is None else self.places
        found = [n for n, place in enumerate(own) if start <= place < stop]
        places = None if self.places is None else tuple(own[n] - start for n in found)
        return replace(self.select(found), places=places) if found else None

    def select(self, indices: Sequence[int]) -> "ModelSide":
        """Return the side of some of its examples. It has no `aligned_rows` and no `gate_weights`."""
        names = ("hidden", "input_embeddings", "target_embeddings", "target_ids", "byte_ends", "attention")
        given = {name: getattr(self, name) for name in (*names, "target_log_probs")}
        cut: dict[str, Any] = {n: v if v is None else of_examples(v, self.counts, indices) for n, v in given.items()}
        counts = tuple(self.counts[n] for n in indices)
        lengths = of_examples(self.lengths, [1] * len(self.counts), indices)
        return replace(self, **cut, lengths=lengths, num_rows=counts, aligned_rows=None, gate_weights=None)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """`num_rows`, or else `lengths` copied once from the device, which synchronises it."""
        return tuple(self.lengths.tolist()) if self.num_rows is None else self.num_rows


@dataclass(frozen=True)
class LossOutput:
    """The value of a loss and of each of its terms.

    Args:
        loss: weighted sum of the terms, in nats per student response token. Carries gradient.
        terms: unweighted, detached value of each term by its public name, in the same unit.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
