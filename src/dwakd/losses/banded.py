"""Soft-DTW divergences of long sequences: costs are computed in a band of the table only, with their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd.kernels.soft_dtw import expected_alignment
from dwakd.kernels.soft_dtw.band import band_starts, border_mass, rows_per_block
from dwakd.losses.band import Band

_CELLS = {"cpu": 1 << 23, "cuda": 1 << 26}  # cells of tables that are computed at a time
_UNTRAINED = 1e-6  # largest entry of an embedding that counts as 0
Rows = Float[Tensor, "tokens _"]
Pair = tuple[Float[Tensor, "s_tokens _"], Float[Tensor, "t_tokens _"]]


def unit_vectors(rows: Rows) -> Rows:
    """Scale vectors to length 1, in float32 or better. A vector whose entries are all below 1e-6 becomes zero.

    Such a vector is the embedding of an untrained token. The gradient of its direction would be huge.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    zero = rows.detach().abs().amax(-1, keepdim=True) < _UNTRAINED
    return rows / rows.norm(dim=-1, keepdim=True).masked_fill(zero, torch.inf)


def banded_divergences(
    pairs: Sequence[Pair],
    counts: tuple[Sequence[int], Sequence[int]],
    *,
    gamma: float,
    band: Band | None,
    width: int,
    max_border: float,
    impl: str = "auto",
) -> tuple[list[Float[Tensor, " batch"]], Float[Tensor, " batch"]]:
    """Compute `soft_dtw_divergences` from a band of each table, and how much of the alignment reaches its border.

    Each table is computed in a band of `width` columns. If the mass on its border (`border_mass`) exceeds `max_border`, a band
    around the diagonal is tried too, and then twice the width, until the band covers the table. The gradients of the vectors
    are computed in the forward pass, so no table is stored.

    Args:
        pairs: student and teacher vectors, packed over the examples. Gradient flows to both.
        counts: student and teacher tokens of each example.
        gamma: temperature of the soft minimum.
        band: penalty outside a band, which also gives the centre of the computed columns; without it, the diagonal does.
        width: columns to compute in each row at first.
        max_border: largest mass on the border.
        impl: kernel of `soft_dtw`.

    Returns:
        One value per example for each pair, and for each example the largest mass on the border of its tables.
    """
    rows = [unit_vectors(side) for pair in pairs for side in pair]
    dtype = rows[0].dtype
    for side in rows:
        dtype = torch.promote_types(dtype, side.dtype)
    settings = _Settings(counts, gamma, band, width, max_border, impl)
    scores, border = _Divergences.apply(settings, *(side.to(dtype) for side in rows))  # type: ignore[no-untyped-call]
    return list(scores), border


class _Settings(NamedTuple):
    """Arguments of `banded_divergences`."""

    counts: tuple[Sequence[int], Sequence[int]]
    gamma: float
    band: Band | None
    width: int
    max_border: float
    impl: str


@dataclass(frozen=True)
class _Table:
    """The costs between two sequences, and the gradients of both.

    A table of a sequence with itself counts half in the value and wholly in the gradient of its first factor, because the
    other half of its gradient is the same.
    """

    pair: int
    example: int
    x: Tensor
    y: Tensor
    x_grad: Tensor
    y_grad: Tensor | None  # None if y is x
    centre: Tensor
    band: Band | None = None

    @property
    def on_diagonal(self) -> _Table:
        return replace(self, centre=_diagonal(len(self.x), len(self.y)))

    def blocks(self, starts: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
        """Return rows and columns of each block of the band with starts of a band of `width`."""
        size = rows_per_block(len(self.x), len(self.y), width)
        for first, start in zip(range(0, len(self.x), size), starts[::size].tolist(), strict=True):
            yield slice(first, min(first + size, len(self.x))), slice(start, min(start + width, len(self.y)))

    def fill(self, costs: Tensor, starts: Tensor, width: int) -> None:
        """Write the costs of the band."""
        for rows, columns in self.blocks(starts, width):
            part = costs[rows, : columns.stop - columns.start]
            torch.mm(self.x[rows], self.y[columns].T, out=part)
            torch.sub(1.0, part, out=part)
            if self.band is not None:
                part.add_(self.band.is_outside(self.example, rows, columns), alpha=self.band.penalty)

    def add_gradient(self, alignment: Tensor, starts: Tensor, width: int) -> None:
        """Add the gradient of the divergence, from the expected alignment."""
        for rows, columns in self.blocks(starts, width):
            part = alignment[rows, : columns.stop - columns.start]
            self.x_grad[rows].addmm_(part, self.y[columns], alpha=1.0 if self.y_grad is None else -1.0)
            if self.y_grad is not None:
                self.y_grad[columns].addmm_(part.T, self.x[rows], alpha=-1.0)


class _Solved(NamedTuple):
    table: _Table
    starts: Tensor
    value: Tensor
    alignment: Tensor
    border: float


def _diagonal(n: int, m: int) -> Tensor:
    return torch.arange(n) * (m / n)


def _tables(settings: _Settings, rows: Sequence[Tensor], grads: Sequence[Tensor]) -> list[_Table]:
    band, tables = settings.band, []
    parts = [
        [torch.split(side, list(settings.counts[place % 2])) for side in (rows[place], grads[place])]
        for place in range(len(rows))
    ]
    for example in range(len(settings.counts[0])):
        for pair in range(len(rows) // 2):
            (x, x_grad), (y, y_grad) = ([part[example] for part in parts[2 * pair + place]] for place in (0, 1))
            centre = _diagonal(len(x), len(y))
            if band is not None:
                centre = (band.centre[example, : len(x)] - band.first_index).cpu()
            tables.append(_Table(pair, example, x, y, x_grad, y_grad, centre, band))
            for own, grad in ((x, x_grad), (y, y_grad)):
                tables.append(_Table(pair, example, own, own, grad, None, _diagonal(len(own), len(own))))
    return tables


def _attempt(tables: Sequence[_Table], width: int, settings: _Settings) -> Iterator[_Solved]:
    """Solve tables in bands of a width. A table without such a band gets an infinite mass on the border."""
    longest = max(len(table.x) for table in tables)
    size = max(1, _CELLS.get(tables[0].x.device.type, 1 << 23) // (longest * width))
    for first in range(0, len(tables), size):
        group, bands = [], []
        for table in tables[first : first + size]:
            starts = band_starts(table.centre, len(table.y), width)
            if starts is None:
                yield _Solved(table, torch.zeros(0), torch.tensor(torch.inf), torch.zeros(0), torch.inf)
            else:
                group.append(table)
                bands.append(starts)
        if group:
            yield from _solve(group, bands, width, settings)


def _solve(tables: list[_Table], bands: list[Tensor], width: int, settings: _Settings) -> Iterator[_Solved]:
    x = tables[0].x
    x_lengths, y_lengths = (
        torch.tensor([len(side) for side in sides], device=x.device)
        for sides in zip(*((table.x, table.y) for table in tables), strict=True)
    )
    n, width = max(len(table.x) for table in tables), min(width, max(len(table.y) for table in tables))
    costs = x.new_empty(len(tables), n, width)
    starts = torch.nn.utils.rnn.pad_sequence(bands, batch_first=True)
    for table, cost, own in zip(tables, costs, bands, strict=True):
        table.fill(cost, own, width)
    starts = starts.to(x.device)
    values, alignments = expected_alignment(costs, settings.gamma, x_lengths, y_lengths, starts, settings.impl)
    borders = border_mass(alignments, starts, y_lengths).tolist()
    del costs
    for solved in zip(tables, bands, values, alignments, borders, strict=True):
        yield _Solved(*solved)


class _Divergences(torch.autograd.Function):
    """Compute the divergences of all pairs and examples, and the gradients of their vectors."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *rows: Tensor) -> tuple[Tensor, Tensor]:
        grads = [torch.zeros_like(side) for side in rows]
        scores = rows[0].new_zeros(len(rows) // 2, len(settings.counts[0]))
        border = torch.zeros_like(scores[0])
        tables, width = _tables(settings, rows, grads), settings.width
        while tables:
            wider = []
            for solved in _attempt(tables, width, settings):
                best = solved
                if best.border > settings.max_border and best.table.band is not None:
                    (other,) = _attempt([best.table.on_diagonal], width, settings)
                    best = min(best, other, key=lambda each: each.value.item())
                if best.border > settings.max_border:
                    wider.append(best.table)
                    continue
                table = best.table
                table.add_gradient(best.alignment, best.starts, width)
                scores[table.pair, table.example] += best.value * (1.0 if table.y_grad is not None else -0.5)
                border[table.example] = max(border[table.example].item(), best.border)
            tables, width = wider, 2 * width
        ctx.save_for_backward(*grads)
        ctx.counts = settings.counts
        ctx.mark_non_differentiable(border)
        return scores, border

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        counts = [torch.tensor(side, device=grad_scores.device) for side in ctx.counts]
        factors = [
            grad_scores[place // 2].repeat_interleave(counts[place % 2]) for place in range(len(ctx.saved_tensors))
        ]
        return None, *(grad * factor[:, None] for grad, factor in zip(ctx.saved_tensors, factors, strict=True))
