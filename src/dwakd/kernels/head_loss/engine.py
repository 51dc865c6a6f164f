"""Compute logits, criterion and gradients for a few tokens at a time, all in the forward pass."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.head_loss.criterion import Chunk, Criterion, HeadRows, Statistics, nonzero
from dwakd.kernels.head_loss.products import HeadProducts
from dwakd.kernels.head_loss.statistics import infinite_if_forbidden

Group = list[Chunk]
"""Chunks that are weighted together. With more than one, a separate pass computes their statistics."""


class ChunkedRun:
    """Evaluate a criterion once over a batch; unless gradients are disabled, also differentiate it.

    The arguments are those of `dwakd.kernels.head_loss.head_loss`.
    """

    def __init__(self, sides: Sequence[HeadRows], criterion: Criterion, budget: int, *, by_row: bool) -> None:
        self.sides, self.criterion, self.by_row = sides, criterion, by_row
        heads = [side.head for side in sides]
        self.dtype = torch.promote_types(heads[0].weight.dtype, torch.float32)
        # hidden states of all sides, then the heads' weights, then their biases; their gradients in the same order
        self.inputs = [*(side.hidden for side in sides), *(h.weight for h in heads), *(h.bias for h in heads)]
        with_gradient = torch.is_grad_enabled()
        self.learns = [with_gradient and tensor is not None and tensor.requires_grad for tensor in self.inputs]
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(side.hidden) if learns else None for side, learns in zip(sides, self.learns, strict=False)
        ] + [None] * (2 * len(sides))
        self.needs = [any(self.learns[index :: len(sides)]) for index in range(len(sides))]
        self.groups = self._plan(budget)
        self.products = self._products()
        self.collected: list[tuple[dict[str, Tensor], Statistics]] = []
        self.statistic_names: tuple[str, ...] = ()

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
            parts = [None if p is None else (p.data_ptr(), p.shape, p.stride()) for p in (head.weight, head.bias)]
            shared.setdefault((*parts, head.scale, head.soft_cap), []).append(index)
        chunks = [chunk for group in self.groups for chunk in group]
        products = []
        for indices in shared.values():
            rows = max((sum(_length(chunk.rows[i]) for i in indices) for chunk in chunks), default=0)
            head = self.sides[indices[0]].head.detached()
            products.append((indices, HeadProducts(head, rows, with_gradient=any(self.needs))))
        return products

    def run(self) -> tuple[Tensor, dict[str, Tensor], Statistics]:
        """Return the loss and its terms (one value per token with `by_row`), and the statistics of all tokens."""
        for group in self.groups:
            self._run_group(group)
        zero = self.sides[0].hidden.new_zeros(0 if self.by_row else (), dtype=self.dtype)
        terms = dict.fromkeys(self.criterion.rates, zero)
        for name in terms if self.collected else ():
            values = [values[name] for values, _ in self.collected]
            terms[name] = torch.cat(values) if self.by_row else torch.stack([v.sum() for v in values]).sum()
        total = torch.stack([rate * terms[name] for name, rate in nonzero(self.criterion.rates).items()]).sum(0)
        return total, terms, _concatenated([statistics for _, statistics in self.collected])

    def _run_group(self, group: Group) -> None:
        criterion, first = self.criterion, group[0]
        lengths = None if first.examples is None else self.sides[0].lengths[first.examples]
        seen = []
        for chunk in group:
            logits = self._logits(chunk)
            seen.append(criterion.observe(logits, chunk))
        weights = criterion.weights(_concatenated(seen), lengths)
        start = first.rows[0].start
        for chunk, statistics in zip(group, seen, strict=True):
            if len(group) > 1:  # compute each product again, because the buffers contain the last chunk
                logits = self._logits(chunk)
                statistics = criterion.observe(logits, chunk)
            own = None if weights is None else weights[chunk.rows[0].start - start : chunk.rows[0].stop - start]
            terms = criterion.differentiate(logits, chunk, statistics, own, self.needs)
            self.collected.append(({name: infinite_if_forbidden(value) for name, value in terms.items()}, statistics))
            for indices, products in self.products:
                self._pull_back([index for index in indices if self.needs[index]], products, chunk)

    def _logits(self, chunk: Chunk) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for indices, products in self.products:
            rows = [self.sides[index].hidden[chunk.rows[index]] for index in indices]
            found |= dict(zip(indices, products.logits(rows), strict=True))
        return [found[index] for index in range(len(self.sides))]

    def _pull_back(self, learned: list[int], products: HeadProducts, chunk: Chunk) -> None:
        """Compute the gradients of a head and of the hidden states of all sides that share this head."""
        if not learned:
            return
        sizes = [_length(chunk.rows[index]) for index in learned]
        gradient, rows = products.pull_back(sum(sizes))
        if any(self.learns[index] for index in learned):
            pulled = torch.mm(gradient.t(), products.head.weight)
            if products.head.scale != 1.0:
                pulled.mul_(products.head.scale)
            for index, part in zip(learned, torch.split(pulled, sizes), strict=True):
                kept = self.gradients[index]
                if kept is not None:
                    kept[chunk.rows[index]] = part.to(kept.dtype)
        parts = torch.split(gradient, sizes, dim=1), torch.split(rows, sizes)
        for index, columns, own in zip(learned, *parts, strict=True):
            self._add_head_gradients(index, columns, own, products.head.scale)

    def _add_head_gradients(self, index: int, columns: Tensor, rows: Tensor, scale: float) -> None:
        """Add one chunk's gradients of the head's weight and bias, in float32 or better."""
        weight, bias = index + len(self.sides), index + 2 * len(self.sides)
        if self.learns[weight]:
            kept = self.gradients[weight]
            if kept is not None and kept.dtype == columns.dtype:
                kept.addmm_(columns, rows)
            else:
                added = torch.mm(columns, rows)
                self.gradients[weight] = added.to(self.dtype) if kept is None else kept.add_(added)
        if self.learns[bias]:
            added, kept = columns.sum(1, dtype=self.dtype) * scale, self.gradients[bias]
            self.gradients[bias] = added if kept is None else kept.add_(added)


class ChunkedHeadLoss(torch.autograd.Function):
    """Run the engine in the forward pass, and multiply its gradients by the upstream gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: ChunkedRun, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(run.sides[0].hidden.device.type, enabled=False):
            total, terms, statistics = run.run()
        ctx.save_for_backward(
            *(
                torch.zeros_like(tensor) if gradient is None and tensor is not None and learns else gradient
                for tensor, gradient, learns in zip(inputs, run.gradients, run.learns, strict=True)
            )
        )
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        run.statistic_names = tuple(statistics)
        constants = [v.clone() if v is total else v for v in (*terms.values(), *statistics.values())]
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


def _concatenated(parts: Sequence[Statistics]) -> Statistics:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _length(rows: slice) -> int:
    length: int = rows.stop - rows.start
    return length


def plan_rows(num_rows: int, num_sides: int, row_bytes: int, budget: int) -> list[Group]:
    """Divide the batch into chunks of nearly equal size; an example may be divided."""
    return [[chunk] for chunk in _even(slice(0, num_rows), None, num_sides, row_bytes, budget)]


def plan_examples(
    lengths: Sequence[Sequence[int]], row_bytes: Sequence[int], budget: int, *, divisible: bool
) -> list[Group]:
    """Divide the batch into chunks of whole examples; `lengths` and `row_bytes` are given for each side.

    If `divisible`, which requires sides of equal lengths, an example above the budget becomes several chunks.
    """
    groups: list[Group] = []
    starts = ends = [0] * len(lengths)
    first, held = 0, 0

    def finish(stop: int) -> None:
        """Make the examples from `first` to `stop` - 1 a group of one chunk."""
        nonlocal starts, first, held
        if first < stop:
            groups.append([Chunk(tuple(map(slice, starts, ends)), slice(first, stop))])
        starts, first, held = ends, stop, 0

    for example, counts in enumerate(zip(*lengths, strict=True)):
        size = sum(count * width for count, width in zip(counts, row_bytes, strict=True))
        if held + size > budget:
            finish(example)
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        held += size
        if divisible and size > budget:
            own, rows = slice(example, example + 1), slice(starts[0], ends[0])
            groups.append(_even(rows, own, len(lengths), sum(row_bytes), budget))
            starts, first, held = ends, example + 1, 0
    finish(len(lengths[0]))
    return groups


def _even(rows: slice, examples: slice | None, num_sides: int, row_bytes: int, budget: int) -> Group:
    """Divide a range into equal chunks; a small last chunk would have slow matrix products."""
    count = -(-_length(rows) // max(budget // row_bytes, 1))
    bounds = [rows.start + _length(rows) * index // max(count, 1) for index in range(count + 1)]
    return [Chunk((slice(a, b),) * num_sides, examples) for a, b in pairwise(bounds)]
