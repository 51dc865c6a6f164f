"""Test sorted distances: values known by hand, and the compiled kernel against the naive version."""

import inspect

import pytest
import torch

from dwakd.kernels import sorted_distance

IMPLS = ("naive", "cpu")
both_impls = pytest.mark.parametrize("impl", IMPLS)


def probabilities(rows: int, vocab: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocab, generator=generator)).softmax(-1)


@both_impls
def test_values_of_the_specification(impl):
    """The distances of small examples equal those computed by hand, also for vocabularies of different sizes."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert sorted_distance(p, q, impl=impl)[0].item() == pytest.approx(0.4, abs=1e-6)
    assert sorted_distance(q, p, impl=impl)[0].item() == pytest.approx(0.4, abs=1e-6)
    one_hot, uniform = torch.eye(8)[:1], torch.full((1, 8), 1 / 8)
    assert sorted_distance(one_hot, uniform, impl=impl)[0].item() == pytest.approx(2 * (1 - 1 / 8), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 9), (7, 3000, 5000), (3, 5000, 3000), (0, 4, 6)])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_kernel_equals_the_naive_one(shape, threads):
    """The compiled kernel gives the values and gradients of the naive version for any number of threads."""
    rows, vocab, other = shape
    p, q = probabilities(rows, vocab, 0), probabilities(rows, other, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = sorted_distance(p, q, impl="cpu")
    finally:
        torch.set_num_threads(before)
    expected = sorted_distance(p.double(), q.double(), impl="naive")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)


@both_impls
def test_rows_of_equal_values_and_of_zeros(impl):
    """Rows with many equal probabilities have the right distance, and a gradient that sums to 0."""
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    distance, slope = sorted_distance(p, q, impl=impl)
    torch.testing.assert_close(distance, torch.tensor([1.0, 0.0]))
    assert slope.sum(-1).abs().max() < 1e-6
    assert slope[1].abs().max() == 0


@both_impls
def test_the_gradient_is_that_of_sorting(impl):
    """The gradient equals autograd's gradient through `sort`."""
    p, q = probabilities(4, 50, 5).requires_grad_(), probabilities(4, 40, 6)
    gap = torch.nn.functional.pad(q.sort(-1, descending=True).values, (0, 10))
    (expected,) = torch.autograd.grad((p.sort(-1, descending=True).values - gap).abs().sum(), p)
    torch.testing.assert_close(sorted_distance(p, q, impl=impl)[1], expected, atol=0, rtol=0)


def test_bad_arguments_are_named():
    """An implementation that is unknown or does not support the dtype raises a ValueError instead of running another one."""
    p = probabilities(2, 5, 0)
    with pytest.raises(ValueError, match="unknown impl 'gpu'; valid are 'auto', 'naive', 'cpu'"):
        sorted_distance(p, p, impl="gpu")
    with pytest.raises(ValueError, match="sorted_distance: 2 rows of p, but 1 of q"):
        inspect.unwrap(sorted_distance)(p, p[:1])  # without the check of types in these tests
    with pytest.raises(ValueError, match=r"impl 'cpu' .*float32.* torch\.float64"):
        sorted_distance(p.double(), p.double(), impl="cpu")
