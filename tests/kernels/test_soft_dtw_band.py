"""Test Soft-DTW inside a band against the full table in float64, the choice of the band, and the mass on its border."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwakd.kernels import soft_dtw
from dwakd.kernels.soft_dtw import expected_alignment
from dwakd.kernels.soft_dtw.band import band_starts, border_mass

IMPLS = ("naive", "cpu")


def random_band(generator: torch.Generator, n: int, width: int) -> tuple[Tensor, int]:
    """Return starts that keep, jump by up to width - 1 columns or do both, and a number of columns that they reach."""
    steps = torch.randint(0, width, (n,), generator=generator) * torch.randint(0, 2, (n,), generator=generator)
    steps[0] = 0
    starts = steps.cumsum(0)
    return starts, int(starts[-1]) + int(torch.randint(1, width + 1, (1,), generator=generator))


def full_table(cost: Tensor, starts: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the full table of a band, +inf outside, and a mask of the cells of the band that belong to the table."""
    columns = starts[:, None] + torch.arange(cost.shape[1])
    table = torch.full((len(cost), m), torch.inf, dtype=torch.float64)
    valid = columns < m
    rows = torch.arange(len(cost))[:, None].expand_as(columns)
    table[rows[valid], columns[valid]] = cost.double()[valid]
    return table, valid


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    width=st.integers(1, 24),
    gamma=st.sampled_from([1e-3, 0.5, 2.0, 1e3]),
    scale=st.sampled_from([1.0, 1.0, 1e30]),
    impl=st.sampled_from([*IMPLS, "cpu", "cpu"]),
)
def test_a_band_equals_the_table_with_infinite_costs_outside(
    seed: int, sizes: list[int], width: int, gamma: float, scale: float, impl: str
) -> None:
    """A ragged batch of bands, among them flat and steep ones and extreme costs, equals the full tables one by one."""
    generator = torch.Generator().manual_seed(seed)
    bands = [random_band(generator, n, width) for n in sizes]
    starts = torch.zeros(len(sizes), max(sizes) + 2, dtype=torch.long)
    cost = torch.full((*starts.shape, width), torch.nan)  # neither rows nor columns beyond the table are read
    expected = []
    for row, (n, (own, m)) in enumerate(zip(sizes, bands, strict=True)):
        starts[row, :n] = own
        values = torch.rand(n, width, generator=generator) * scale
        values[torch.rand(values.shape, generator=generator) < 0.03] = torch.inf
        table, valid = full_table(values, own, m)
        cost[row, :n] = values.masked_fill(~valid, torch.nan)
        table.requires_grad_()
        value = soft_dtw(table[None], gamma, impl="naive")[0]
        (grad,) = torch.autograd.grad(value, table)
        expected.append((value.detach(), grad[table.isfinite()]))
    cost.requires_grad_()
    lengths = torch.tensor(sizes), torch.tensor([m for _, m in bands])
    value = soft_dtw(cost, gamma, *lengths, impl=impl, starts=starts)
    (grad,) = torch.autograd.grad(value.sum(), cost)
    assert grad[~cost.isfinite()].eq(0).all()
    for row, (each, each_grad) in enumerate(expected):
        torch.testing.assert_close(value[row].double(), each, rtol=1e-6, atol=2e-6)
        if scale == 1:  # paths of huge costs differ by less than the rounding of their sum
            torch.testing.assert_close(
                grad[row][cost[row].isfinite()].double(), each_grad, rtol=0, atol=5e-6 if gamma > 0.1 else 1e-4
            )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_band_of_all_columns_is_the_full_table(impl: str) -> None:
    """If the band covers all columns, value and gradient are those of the full table to the last bit."""
    torch.manual_seed(0)
    cost = torch.rand(2, 30, 41) * 2
    lengths = torch.tensor([30, 21]), torch.tensor([33, 41])
    starts = torch.stack([band_starts(torch.rand(30) * 41, 41, 41)] * 2)
    results = []
    for band in (None, starts):
        leaf = cost.clone().requires_grad_()
        value = soft_dtw(leaf, 2.0, *lengths, impl=impl, starts=band)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert border_mass(results[1][1], starts, lengths[1]).eq(0).all()


def test_a_narrow_band_gives_the_gradient_of_the_full_table() -> None:
    """With a quarter of the columns, the gradient is within 1e-4. The border mass shows whether a band is too narrow."""
    torch.manual_seed(1)
    n, m = 300, 330
    cost = torch.rand(n, m) * 2
    table = cost.double().requires_grad_()
    value = soft_dtw(table[None], 2.0)[0]
    (expected,) = torch.autograd.grad(value, table)
    masses, errors = [], []
    for width in (12, 48, 112):
        starts = band_starts(torch.arange(n) * m / n, m, width)
        columns = starts[:, None] + torch.arange(width)
        lengths = torch.tensor([n]), torch.tensor([m])
        found, alignment = expected_alignment(cost.gather(1, columns)[None], 2.0, *lengths, starts[None])
        masses.append(border_mass(alignment, starts[None], lengths[1]).item())
        errors.append((torch.zeros_like(expected).scatter(1, columns, alignment[0].double()) - expected).abs().max())
        assert found.item() >= value.item() - 1e-3  # paths are missing, none is added
    assert masses[0] > 0.1
    assert masses[0] > masses[1] > 1e-4 > 1e-5 > masses[2]
    assert errors[0] > 0.1
    assert errors[1] > 1e-4 > errors[2]
    assert found.item() == pytest.approx(value.item(), abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), width=st.integers(1, 6))
def test_border_mass_is_the_largest_sum_of_a_row(seed: int, n: int, width: int) -> None:
    """Cells with a neighbour in the table that is outside the band are counted, and the border of the table is not."""
    generator = torch.Generator().manual_seed(seed)
    starts, m = random_band(generator, n, width)
    alignment = torch.rand(n, width, generator=generator, dtype=torch.float64)
    inside = {(i, int(starts[i]) + t) for i in range(n) for t in range(width) if starts[i] + t < m}
    sides = [0.0] * n
    for i, j in inside:
        value = alignment[i, j - starts[i]].item()
        outside = [
            0 <= p < n and 0 <= q < m and (p, q) not in inside
            for p, q in ((i, j - 1), (i + 1, j), (i, j + 1), (i - 1, j))
        ]
        sides[i] += value * (any(outside[:2]) + any(outside[2:]))
    alignment[(starts[:, None] + torch.arange(width)) >= m] = 0.0
    mass = border_mass(alignment[None], starts[None], torch.tensor([m]))
    assert mass.item() == pytest.approx(max(sides), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 200), m=st.integers(1, 200), width=st.integers(1, 64))
def test_a_band_follows_its_centre_from_the_first_cell_to_the_last(seed: int, n: int, m: int, width: int) -> None:
    """Starts of any centre form a valid band, and the band has the centre in its middle if the centre is monotone."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, generator=generator) * m
    starts = band_starts(centre, m, width)
    if starts is None:
        assert width < m
        assert (n - 1) * (width - 1) + width < m or n * width < 8 * m
        return
    cost = torch.rand(1, n, min(width, m), generator=generator)
    value = soft_dtw(cost, 1.0, torch.tensor([n]), torch.tensor([m]), starts=starts[None])  # raises unless it is a band
    assert value.isfinite().all()
    diagonal = band_starts(torch.arange(n) * m / n, m, width)
    middle = torch.arange(n) * m / n - diagonal
    free = (diagonal > 0) & (diagonal < m - width)
    if width > 8 and n >= m:
        assert (middle[free] - width / 2).abs().le(width / 8 + 2).all()


def test_mistakes_are_named() -> None:
    """Starts that are not a band raise a ValueError that names the example."""
    cost, lengths = torch.zeros(2, 3, 4), (torch.tensor([3, 3]), torch.tensor([6, 6]))
    good = [0, 1, 2]
    for bad in ([1, 1, 2], [0, 1, 0], [0, 0, 4], [0, 0, 1], [0, 2, 6]):
        with pytest.raises(ValueError, match=r"starts\[1\] must begin with 0"):
            soft_dtw(cost, 1.0, *lengths, starts=torch.tensor([good, bad]))
    assert soft_dtw(cost, 1.0, *lengths, starts=torch.tensor([good, good])).isfinite().all()
