"""Compute logits, criterion and gradients for a few tokens at a time, all in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss.criterion import Chunk, Criterion, Statistics
from dwakd.kernels.head_loss.plan import Group, plan_examples, plan_rows
from dwakd.kernels.head_loss.products import HeadProducts
from dwakd.kernels.head_loss.statistics import infinite_if_forbidden


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


class ChunkedRun:
    """Evaluate a criterion once over a batch.

    The run also computes the gradients of all inputs that require them, unless gradients are disabled.

    Args:
        sides: the sides of the batch.
        criterion: computes the terms from the logits.
        budget: most bytes of logits in memory.
        by_row: return one value per token instead of a sum.
    """

    def __init__(self, sides: Sequence[HeadRows], criterion: Criterion, budget: int, *, by_row: bool) -> None:
        self.sides, self.criterion, self.by_row = sides, criterion, by_row
        self.dtype = torch.promote_types(sides[0].head.weight.dtype, torch.float32)
        self.with_gradient = torch.is_grad_enabled()
        self.learns_hidden = [self._learns(side.hidden) for side in sides]
        self.needs = [
            any(self._learns(tensor) for tensor in (side.hidden, side.head.weight, side.head.bias)) for side in sides
        ]
        self.groups = self._plan(budget)
        self.products = self._products()
        self.hidden_gradients = [
            torch.zeros_like(side.hidden) if learns else None
            for side, learns in zip(sides, self.learns_hidden, strict=True)
        ]
        self.weight_gradients: list[Tensor | None] = [None] * len(sides)
        self.bias_gradients: list[Tensor | None] = [None] * len(sides)
        self.collected: list[tuple[dict[str, Tensor], Statistics]] = []
        self.term_names: tuple[str, ...] = ()
        self.statistic_names: tuple[str, ...] = ()

    def _learns(self, tensor: Tensor | None) -> bool:
        return self.with_gradient and tensor is not None and tensor.requires_grad

    def _plan(self, budget: int) -> list[Group]:
        widths = [HeadProducts.row_bytes(side.head) for side in self.sides]
        if self.criterion.unit == "rows":
            return plan_rows(self.sides[0].hidden.shape[0], len(self.sides), sum(widths), budget)
        counts = [side.counts for side in self.sides if side.counts is not None]
        if len(counts) < len(self.sides):
            counts = torch.stack([side.lengths for side in self.sides]).tolist()
        return plan_examples(counts, widths, budget, divisible=self.criterion.unit == "weights")

    def _products(self) -> list[tuple[list[int], HeadProducts]]:
        """Group the sides by head, those that need a gradient first, so that their columns are contiguous."""
        shared: dict[tuple[Any, ...], list[int]] = {}
        for index in sorted(range(len(self.sides)), key=lambda index: not self.needs[index]):
            head = self.sides[index].head
            places = [
                None if part is None else (part.data_ptr(), part.shape, part.stride())
                for part in (head.weight, head.bias)
            ]
            shared.setdefault((*places, head.scale, head.soft_cap), []).append(index)
        chunks = [chunk for group in self.groups for chunk in group.chunks]
        return [
            (
                indices,
                HeadProducts(
                    self.sides[indices[0]].head.detached(),
                    max((sum(_length(chunk.rows[i]) for i in indices) for chunk in chunks), default=0),
                    with_gradient=any(self.needs),
                ),
            )
            for indices in shared.values()
        ]

    def run(self) -> tuple[Tensor, dict[str, Tensor], Statistics]:
        """Return the loss and its terms (one value per token with `by_row`), and the statistics of all tokens."""
        for group in self.groups:
            self._run_group(group)
        zero = self.sides[0].hidden.new_zeros(0 if self.by_row else (), dtype=self.dtype)
        terms = dict.fromkeys(self.criterion.rates, zero)
        statistics: Statistics = {}
        if self.collected:
            for name in terms:
                values = [values[name] for values, _ in self.collected]
                terms[name] = torch.cat(values) if self.by_row else torch.stack([v.sum() for v in values]).sum()
            statistics = {
                name: torch.cat([statistics[name] for _, statistics in self.collected]) for name in self.collected[0][1]
            }
        total = torch.stack([rate * terms[name] for name, rate in self.criterion.rates.items()]).sum(0)
        return total, terms, statistics

    def _run_group(self, group: Group) -> None:
        criterion = self.criterion
        lengths = None if group.examples is None else self.sides[0].lengths[group.examples]
        if len(group.chunks) == 1:
            (chunk,) = group.chunks
            logits = self._logits(chunk)
            statistics = criterion.observe(logits, chunk)
            self._finish(logits, chunk, statistics, criterion.weights(statistics, lengths))
            return
        seen = [criterion.observe(self._logits(chunk), chunk) for chunk in group.chunks]
        weights = criterion.weights({name: torch.cat([s[name] for s in seen]) for name in seen[0]}, lengths)
        start = group.chunks[0].rows[0].start
        for chunk in group.chunks:
            logits = self._logits(chunk)
            own = slice(chunk.rows[0].start - start, chunk.rows[0].stop - start)
            self._finish(logits, chunk, criterion.observe(logits, chunk), None if weights is None else weights[own])

    def _logits(self, chunk: Chunk) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for indices, products in self.products:
            rows = [self.sides[index].hidden[chunk.rows[index]] for index in indices]
            found |= dict(zip(indices, products.logits(rows), strict=True))
        return [found[index] for index in range(len(self.sides))]

    def _finish(self, logits: list[Tensor], chunk: Chunk, statistics: Statistics, weights: Tensor | None) -> None:
        terms = self.criterion.differentiate(logits, chunk, statistics, weights, self.needs)
        self.collected.append(({name: infinite_if_forbidden(value) for name, value in terms.items()}, statistics))
        for indices, products in self.products:
            learned = [index for index in indices if self.needs[index]]
            if learned:
                self._pull_back(learned, products, chunk)

    def _pull_back(self, learned: list[int], products: HeadProducts, chunk: Chunk) -> None:
        """Compute the hidden states' gradients in one product for all sides, and the head's gradient for each side."""
        sizes = [_length(chunk.rows[index]) for index in learned]
        gradient, rows = products.pull_back(slice(0, sum(sizes)))
        weight, scale = products.head.weight, products.head.scale
        if any(self.learns_hidden[index] for index in learned):
            pulled = torch.mm(gradient.t(), weight)
            if scale != 1.0:
                pulled.mul_(scale)
            for index, part in zip(learned, torch.split(pulled, sizes), strict=True):
                kept = self.hidden_gradients[index]
                if kept is not None:
                    kept[chunk.rows[index]] = part.to(kept.dtype)
        for index, columns, own in zip(
            learned, torch.split(gradient, sizes, dim=1), torch.split(rows, sizes), strict=True
        ):
            self._add_head_gradients(index, columns, own, scale)

    def _add_head_gradients(self, index: int, columns: Tensor, rows: Tensor, scale: float) -> None:
        """Add one chunk's gradients of the head's weight and bias, in float32 or better."""
        head = self.sides[index].head
        if self._learns(head.weight):
            kept = self.weight_gradients[index]
            if kept is None:
                self.weight_gradients[index] = torch.mm(columns, rows).to(self.dtype)
            elif kept.dtype == columns.dtype:
                kept.addmm_(columns, rows)
            else:
                kept.add_(torch.mm(columns, rows))
        if self._learns(head.bias):
            added = columns.sum(1, dtype=self.dtype) * scale
            kept = self.bias_gradients[index]
            self.bias_gradients[index] = added if kept is None else kept.add_(added)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of each of `inputs`, or None for inputs that require no gradient."""
        found = [*self.hidden_gradients, *self.weight_gradients, *self.bias_gradients]
        return [
            torch.zeros_like(tensor) if gradient is None and tensor is not None and self._learns(tensor) else gradient
            for tensor, gradient in zip(self.inputs(), found, strict=True)
        ]

    def inputs(self) -> list[Tensor | None]:
        """Return the hidden states of all sides, then the heads' weights, then their biases."""
        heads = [side.head for side in self.sides]
        return [*(side.hidden for side in self.sides), *(head.weight for head in heads), *(head.bias for head in heads)]


class ChunkedHeadLoss(torch.autograd.Function):
    """Run the engine in the forward pass, and multiply its gradients by the upstream gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: ChunkedRun, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(run.sides[0].hidden.device.type, enabled=False):
            total, terms, statistics = run.run()
        ctx.save_for_backward(*run.gradients())
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        run.term_names, run.statistic_names = tuple(terms), tuple(statistics)
        constants = tuple(
            value.clone() if value is total else value for value in (*terms.values(), *statistics.values())
        )
        ctx.mark_non_differentiable(*constants)
        return total, *constants

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream[0].unsqueeze(-1) if upstream[0].ndim else upstream[0]
        return None, *(
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def _length(rows: slice) -> int:
    length: int = rows.stop - rows.start
    return length
