"""Test Sinkhorn: known values, and the batched version with its own backward pass against the naive version."""

import math

import pytest
import torch

from dwakd.kernels import sinkhorn

both_impls = pytest.mark.parametrize("impl", ["naive", "batched"])


@both_impls
def test_values_of_the_specification(impl):
    """The values equal known ones, which depend on the order and the number of scalings."""
    swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    assert 2 * sinkhorn(swap, 0.1, 20, impl=impl).item() == pytest.approx(9.08e-5, abs=1e-7)
    cost = torch.tensor([[[0.25, 0.8], [0.85, 0.2]]], dtype=torch.float64)
    assert 2 * sinkhorn(cost, 0.1, 20, impl=impl).item() == pytest.approx(0.453217, abs=1e-6)


@pytest.mark.parametrize("iterations", [1, 20])
def test_the_batched_kernel_equals_the_naive_one(iterations):
    """The batched version gives the values and gradients of the naive version, and padding has no effect."""
    generator = torch.Generator().manual_seed(0)
    cost = 2 * torch.rand(4, 6, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 1, 3]), torch.tensor([3, 5, 1, 5])
    cost[1, 2:], cost[0, :, 3:] = torch.nan, torch.nan
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    results = []
    for impl in ("naive", "batched"):
        leaf = cost.clone().requires_grad_()
        value = sinkhorn(leaf, 0.1, iterations, *lengths, impl=impl)
        (gradient,) = torch.autograd.grad((weights * value).sum(), leaf)
        results.append((value.detach(), gradient))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)
    assert results[1][1][1, 2:].abs().max() == 0


def test_gradient_of_the_batched_kernel():
    """The gradient goes through all iterations and agrees with finite differences."""
    cost = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    lengths = torch.tensor([3, 2]), torch.tensor([2, 4])
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 0.3, 4, *lengths), cost)


@both_impls
def test_small_regularisation_neither_overflows_nor_empties_the_plan(impl):
    """A small regularisation gives finite costs, because the computation is in the log domain."""
    cost = 1 + torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(2))
    value = sinkhorn(cost, 1e-3, 50, impl=impl)
    assert torch.isfinite(value).all()
    assert cost.amin() <= value <= cost.amax()


def test_bad_arguments_are_named():
    """Arguments without a valid transport plan raise a ValueError that contains their values."""
    cost = torch.zeros(1, 2, 2)
    for regularisation in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"regularisation .*got {regularisation} and 20"):
            sinkhorn(cost, regularisation, 20)
    with pytest.raises(ValueError, match=r"iterations .*got 0\.1 and 0"):
        sinkhorn(cost, 0.1, 0)
    with pytest.raises(ValueError, match="unknown impl 'cpu'"):
        sinkhorn(cost, 0.1, 20, impl="cpu")
