"""Define the interface between the chunked engine and the loss terms that a method computes from logits."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss.statistics import blocks, most_probable, peak_of, pick, shifted_exp, subtract_at

Logits = Float[Tensor, "_ _"]
Sides = Sequence[Logits]
Statistics = dict[str, Tensor]


_only: ContextVar[str | None] = ContextVar("only_term", default=None)
_scales: ContextVar[Mapping[str, float]] = ContextVar("scaled_terms", default=MappingProxyType({}))


@contextmanager
def only_term(name: str) -> Iterator[None]:
    """Give all other terms the weight 0 in losses that are computed inside a `with` block."""
    token = _only.set(name)
    try:
        yield
    finally:
        _only.reset(token)


@contextmanager
def only_part(name: str) -> Iterator[None]:
    """Apply `only_term("NAME.TERM")` and `scaled_terms({"NAME.TERM": scale})` to the term TERM of the part NAME."""
    part, dot, term = (_only.get() or "").partition(".")
    scales = {key.removeprefix(f"{name}."): scale for key, scale in _scales.get().items()}
    with scaled_terms(scales), only_term(term if part == name else "") if dot else nullcontext():
        yield


@contextmanager
def scaled_terms(scales: Mapping[str, float]) -> Iterator[None]:
    """Multiply the weights of the named terms in losses that are computed inside a `with` block."""
    token = _scales.set(scales)
    try:
        yield
    finally:
        _scales.reset(token)


def active_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of terms, times those of `scaled_terms`, with those that `only_term` switches off as 0."""
    only, scales = _only.get(), _scales.get()
    return {name: weight * scales.get(name, 1.0) if only in (None, name) else 0.0 for name, weight in weights.items()}


def nonzero(rates: Mapping[str, float]) -> Mapping[str, float]:
    """Leave out rates of 0, because 0 times an infinite term is NaN. If all rates are 0, return them all."""
    return {name: rate for name, rate in rates.items() if rate} or rates


@dataclass(frozen=True)
class HeadRows:
    """Hidden states of one side and the output head that turns them into logits.

    Args:
        hidden: hidden states of all examples, packed; carries gradient unless detached.
        head: the output head; its weight and bias carry gradient unless it is `detached()`.
        lengths: number of tokens of each example.
        counts: the same numbers on the host; without them, a criterion that needs whole examples waits for the device.
    """

    hidden: Float[Tensor, "tokens hidden"]
    head: OutputHead
    lengths: Int[Tensor, " batch"]
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens that are computed together: their range in each side and, unless `Criterion.unit` is "rows", examples."""

    rows: tuple[slice, ...]
    examples: slice | None = None


class Criterion(ABC):
    """Base class of loss terms that are computed from logits, one tensor of shape (tokens, vocab) for each side.

    A subclass implements `terms` in plain torch. It also implements `statistics` and `weights` if the weight of a token
    depends on other tokens of its example. The engine divides the batch into chunks and runs autograd in each chunk. A
    criterion whose speed matters also overrides `observe` and `differentiate`, which compute the same gradient by hand
    and in place. `terms` then remains as the specification.

    If a bias of -inf forbids a token, its logit is -inf in plain torch and `forbidden_logit` in chunks. A term that
    uses this logit is infinite. `rates` are the factors of the terms in the loss, by name.
    """

    unit: str = "rows"
    """How a batch may be divided. "rows": anywhere, and all sides have the same number of tokens. "weights": the same,
    but `weights` needs the statistics of whole examples. "examples": only between examples, because `terms` needs
    whole ones; the sides may have different numbers of tokens."""

    targets: Int[Tensor, " tokens"]
    """Target of each token of the first side, validated by `head_loss`. A criterion may have no targets."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates = active_weights(rates)

    def targets_by_side(self) -> dict[int, Int[Tensor, " tokens"]]:
        """Return the targets by the index of their side, for the sides that have targets."""
        return {0: self.targets} if hasattr(self, "targets") else {}

    @abstractmethod
    def terms(self, logits: Sides, chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        """Compute each term, per token or summed, differentiable in the logits; `weights` are constants per token."""

    def statistics(self, logits: Sides, chunk: Chunk) -> Statistics:
        """Compute the values per token that `weights` needs; they carry no gradient."""
        return {}

    def weights(self, statistics: Statistics, lengths: Int[Tensor, " batch"] | None) -> Float[Tensor, " tokens"] | None:
        """Compute one constant weight per token.

        `lengths` are those of the examples in the chunk, or None if `unit` is "rows".
        """
        return None

    def observe(self, logits: Sides, chunk: Chunk) -> Statistics:
        """Compute the statistics; may overwrite the logits with the input of `differentiate`."""
        return self.statistics(logits, chunk)

    def differentiate(
        self, logits: Sides, chunk: Chunk, statistics: Statistics, weights: Tensor | None, needs: Sequence[bool]
    ) -> dict[str, Tensor]:
        """Return the terms, and overwrite the logits of each side in `needs` with d (sum of rate x term) / d logits."""
        leaves = [side.detach().requires_grad_(need) for side, need in zip(logits, needs, strict=True)]
        with torch.set_grad_enabled(any(needs)):
            terms = self.terms(leaves, chunk, weights)
            total = torch.stack([rate * terms[name].sum() for name, rate in nonzero(self.rates).items()]).sum()
        learned = [index for index, need in enumerate(needs) if need]
        if learned and not total.requires_grad:  # no term depends on these logits
            for index in learned:
                logits[index].zero_()
        elif learned:
            inputs = [leaves[index] for index in learned]
            gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
            for index, gradient in zip(learned, gradients, strict=True):
                logits[index].copy_(gradient)
        return {name: value.detach() for name, value in terms.items()}


class CrossEntropy(Criterion):
    """Cross-entropy of one side in nats, with a hand-written gradient: the term `ce` is -log p(target)."""

    def __init__(self, targets: Int[Tensor, " tokens"], rate: float = 1.0) -> None:
        super().__init__({"ce": rate})
        self.targets = targets

    def terms(self, logits: Sides, chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        return {"ce": cross_entropy(logits[0], self.targets[chunk.rows[0]], reduction="none")}

    def observe(self, logits: Sides, chunk: Chunk) -> Statistics:
        columns = logits[0].t()
        peak, chosen = peak_of(columns), pick(columns, self.targets[chunk.rows[0]])
        total = torch.zeros_like(peak)
        for block in blocks(columns):
            total += shifted_exp(columns[block], peak).sum(0)
        return {"total": total, "ce": total.log() + peak - chosen}

    def differentiate(
        self, logits: Sides, chunk: Chunk, statistics: Statistics, weights: Tensor | None, needs: Sequence[bool]
    ) -> dict[str, Tensor]:
        if needs[0]:
            columns = logits[0].t()
            columns.mul_(self.rates["ce"] / statistics["total"])
            subtract_at(columns, self.targets[chunk.rows[0]], torch.full_like(statistics["ce"], self.rates["ce"]))
        return {"ce": statistics["ce"]}


class WithPrediction(Criterion):
    """Add the statistic `prediction`, the most probable token of one side, to another criterion."""

    def __init__(self, criterion: Criterion, side: int) -> None:
        super().__init__({})
        self.rates = criterion.rates
        self.unit, self.criterion, self.side = criterion.unit, criterion, side

    def targets_by_side(self) -> dict[int, Tensor]:
        return self.criterion.targets_by_side()

    def terms(self, logits: Sides, chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        return self.criterion.terms(logits, chunk, weights)

    def statistics(self, logits: Sides, chunk: Chunk) -> Statistics:
        return self.criterion.statistics(logits, chunk) | {"prediction": logits[self.side].argmax(-1)}

    def observe(self, logits: Sides, chunk: Chunk) -> Statistics:
        prediction = most_probable(logits[self.side].t())
        return self.criterion.observe(logits, chunk) | {"prediction": prediction}

    def weights(self, statistics: Statistics, lengths: Int[Tensor, " batch"] | None) -> Float[Tensor, " tokens"] | None:
        return self.criterion.weights(statistics, lengths)

    def differentiate(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        return self.criterion.differentiate(*arguments, **keywords)
