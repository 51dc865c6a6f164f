"""Test Soft-DTW: published values, agreement of the naive and the compiled kernel, and independence from padding."""

import importlib
import itertools
import logging
import math
import sys
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwakd.kernels import soft_dtw
from dwakd.kernels.dispatch import is_usable
from dwakd.kernels.soft_dtw import Impl

IMPLS = ("naive", "cpu")
EXAMPLE = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]], dtype=torch.float64)

both_impls = pytest.mark.parametrize("impl", IMPLS)


def value_and_grad(cost: Tensor, gamma: float, *lengths: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    cost = cost.detach().clone().requires_grad_()
    value = soft_dtw(cost, gamma, *lengths, impl=impl)
    (grad,) = torch.autograd.grad(value.sum(), cost)
    return value.detach(), grad


def alignments(n: int, m: int) -> list[list[tuple[int, int]]]:
    """Return all monotone paths from the first to the last cell of an n x m table."""
    if n == m == 1:
        return [[(0, 0)]]
    before = [(n - 1, m), (n, m - 1), (n - 1, m - 1)]
    return [
        [*path, (n - 1, m - 1)] for rows, columns in before if rows and columns for path in alignments(rows, columns)
    ]


def brute_force(cost: Tensor, gamma: float) -> float:
    """Compute -gamma log sum exp(-cost / gamma) over all alignments by enumeration."""
    n, m = cost.shape

    def totals(i: int, j: int) -> list[float]:
        here = cost[i, j].item()
        if i == j == 0:
            return [here]
        before = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
        return [here + rest for p, q in before if p >= 0 and q >= 0 for rest in totals(p, q)]

    return -gamma * torch.logsumexp(-torch.tensor(totals(n - 1, m - 1), dtype=torch.float64) / gamma, 0).item()


@both_impls
@pytest.mark.parametrize(("gamma", "expected"), [(1.0, 0.232940), (2.0, -1.225505), (0.1, 0.999986)])
def test_published_values(impl: str, gamma: float, expected: float) -> None:
    """The values equal published ones for several values of gamma, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        assert soft_dtw(EXAMPLE.to(dtype), gamma, impl=impl).item() == pytest.approx(expected, abs=1e-6)


@both_impls
def test_published_gradient(impl: str) -> None:
    """The gradient equals the published one."""
    _, grad = value_and_grad(EXAMPLE, 1.0, impl=impl)
    expected = torch.tensor([[1, 0.364789, 0.023120], [0.170835, 0.806046, 1]], dtype=torch.float64)
    torch.testing.assert_close(grad[0], expected, atol=1e-6, rtol=0)


@both_impls
@pytest.mark.parametrize(("n", "m", "paths"), [(1, 1, 1), (1, 7, 1), (2, 2, 3), (3, 3, 13), (2, 3, 5), (4, 4, 63)])
def test_zero_costs_count_the_alignments(impl: str, n: int, m: int, paths: int) -> None:
    """If all costs are 0, the value is -gamma log of the number of alignments, which is a Delannoy number."""
    value = soft_dtw(torch.zeros(1, n, m, dtype=torch.float64), 0.7, impl=impl)
    assert value.item() == pytest.approx(-0.7 * math.log(paths), abs=1e-12)


@both_impls
@pytest.mark.parametrize(("n", "expected"), [(64, -216.844), (128, -441.777), (256, -892.344)])
def test_zero_costs_at_response_lengths(impl: str, n: int, expected: float) -> None:
    """For long sequences and gamma 2, the value keeps its digits. Half precision inside the kernel would lose them."""
    assert soft_dtw(torch.zeros(1, n, n), 2.0, impl=impl).item() == pytest.approx(expected, abs=1e-3)


@both_impls
def test_value_is_the_soft_minimum_over_all_alignments(impl: str) -> None:
    """The value equals an enumeration of all alignments, which does not use the recurrence."""
    torch.manual_seed(0)
    for n, m in itertools.product((1, 2, 4), (1, 3, 5)):
        cost = torch.rand(n, m, dtype=torch.float64)
        assert soft_dtw(cost[None], 0.3, impl=impl).item() == pytest.approx(brute_force(cost, 0.3), abs=1e-12)


@both_impls
def test_gradcheck(impl: str) -> None:
    """The gradient of a ragged batch agrees with finite differences in every cell."""
    torch.manual_seed(0)
    cost = torch.rand(3, 5, 11, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 1, 4]), torch.tensor([11, 3, 1])
    assert torch.autograd.gradcheck(lambda c: soft_dtw(c, 0.5, *lengths, impl=impl), cost)


@both_impls
def test_gradient_is_the_expected_path(impl: str) -> None:
    """The gradient of a cell is the weighted fraction of alignments that pass through it."""
    torch.manual_seed(3)
    for n, m in itertools.product((1, 2, 4), (1, 3, 4)):
        cost = torch.rand(n, m, dtype=torch.float64) * 3
        weights, expected = 0.0, torch.zeros(n, m, dtype=torch.float64)
        for path in alignments(n, m):
            rows, columns = map(list, zip(*path, strict=True))
            weight = math.exp(-cost[rows, columns].sum().item() / 0.7)
            weights += weight
            expected[rows, columns] += weight
        _, grad = value_and_grad(cost[None], 0.7, impl=impl)
        torch.testing.assert_close(grad[0], expected / weights, rtol=0, atol=1e-12)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, :, None] - y[:, None]).square().sum(-1)


@both_impls
def test_barycentre(impl: str) -> None:
    """Gradient descent on Soft-DTW finds a series with a lower mean loss than each target.

    For one target and small gamma, it finds this target.
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.linspace(0, 6, 12, dtype=torch.float64)
    series = torch.stack([(time + shift).sin() for shift in (0.0, 0.4, 0.8)])[..., None]

    def mean_loss(x: Tensor, targets: Tensor, gamma: float) -> Tensor:
        return soft_dtw(squared_distances(x.expand_as(targets), targets), gamma, impl=impl).mean()

    # the single series is monotone: a series that turns has the same loss as warped copies of it
    for targets, gamma in ((series, 1.0), (time[None, :, None], 1e-3)):
        start = targets[:1] + 0.1 * torch.randn(1, 12, 1, generator=generator, dtype=torch.float64)
        x = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([x], lr=0.05)
        for _ in range(150):
            optimiser.zero_grad()
            mean_loss(x, targets, gamma).backward()
            optimiser.step()
        reached = mean_loss(x.detach(), targets, gamma)
        assert reached < mean_loss(start, targets, gamma) - 0.05
        assert all(reached < mean_loss(one[None], targets, gamma) + gamma for one in targets)
    torch.testing.assert_close(x.detach(), targets, rtol=0, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    gamma=st.sampled_from([1e-2, 0.3, 1.0, 10.0]),
)
def test_divergence_is_never_negative(seed: int, n: int, m: int, gamma: float) -> None:
    """The Soft-DTW divergence of squared distances is at least 0, and 0 only for equal series."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, size, 2, generator=generator, dtype=torch.float64) for size in (n, m))
    cross, own_x, own_y = (soft_dtw(squared_distances(*pair), gamma) for pair in ((x, y), (x, x), (y, y)))
    divergence = cross - (own_x + own_y) / 2
    assert divergence >= -1e-9
    assert divergence > 1e-9 or torch.equal(x, y)


@both_impls
@pytest.mark.parametrize("poison", [torch.nan, 1e9, -1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ragged_batch_equals_one_by_one(impl: str, dtype: torch.dtype, poison: float) -> None:
    """A ragged batch gives the same values and gradients as its examples one by one, whatever the padding contains."""
    torch.manual_seed(1)
    pairs = [(1, 1), (1, 9), (9, 1), (8, 8), (7, 20), (33, 16), (17, 40)]
    alone = [torch.rand(n, m, dtype=dtype) for n, m in pairs]
    padded = torch.full((len(pairs), 35, 41), poison, dtype=dtype)
    for row, cost in enumerate(alone):
        padded[row, : cost.shape[0], : cost.shape[1]] = cost
    x_lengths, y_lengths = torch.tensor(pairs).T
    values, grads = value_and_grad(padded, 0.5, x_lengths, y_lengths, impl=impl)
    for row, cost in enumerate(alone):
        n, m = cost.shape
        value, grad = value_and_grad(cost[None], 0.5, impl=impl)
        torch.testing.assert_close(values[row], value[0])
        torch.testing.assert_close(grads[row, :n, :m], grad[0])
        assert grads[row, n:].eq(0).all()
        assert grads[row, :, m:].eq(0).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 24),
    m=st.integers(1, 24),
    gamma=st.sampled_from([1e-3, 0.05, 1.0, 30.0, 1e3]),
    forbidden=st.sampled_from([0.0, 0.1, 0.4]),
    double=st.booleans(),
)
def test_kernels_agree(seed: int, n: int, m: int, gamma: float, forbidden: float, double: bool) -> None:
    """The naive and the compiled kernel agree on random ragged batches with forbidden cells, also without any valid path."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(4, n, m, generator=generator, dtype=torch.float64)
    cost[torch.rand(cost.shape, generator=generator) < forbidden] = torch.inf
    lengths = (torch.randint(1, size + 1, (4,), generator=generator) for size in (n, m))
    x_lengths, y_lengths = lengths
    if not double:
        cost = cost.float().double()  # both kernels get the same costs
    value, grad = value_and_grad(cost, gamma, x_lengths, y_lengths, impl="naive")
    cpu_cost = cost if double else cost.float()
    cpu_value, cpu_grad = value_and_grad(cpu_cost, gamma, x_lengths, y_lengths, impl="cpu")
    assert not grad.isnan().any()
    assert grad[value.isinf()].eq(0).all()
    assert cpu_grad[cost.isinf()].eq(0).all()
    # near-ties of a nearly hard minimum amplify the rounding of the value by 1 / gamma
    tolerance = {"atol": 1e-10, "rtol": 1e-12} if double else {"atol": 2e-6, "rtol": 1e-6}
    torch.testing.assert_close(cpu_value.double(), value, **tolerance)
    torch.testing.assert_close(cpu_grad.double(), grad, **tolerance)


@both_impls
def test_unreachable_end(impl: str) -> None:
    """If no path has a finite cost, the value is +inf with zero gradient. Other examples of the batch are not affected."""
    cost = torch.ones(3, 4, 5)
    cost[0, :, 2] = torch.inf  # no path
    cost[1, :3, 2] = torch.inf  # one gap in a forbidden column
    cost[2, -1, -1] = torch.inf  # the last cell is forbidden
    value, grad = value_and_grad(cost, 1.0, impl=impl)
    assert value.isinf().tolist() == [True, False, True]
    assert grad[[0, 2]].eq(0).all()
    assert grad.isfinite().all()
    assert grad[1, :3, 2].eq(0).all()
    assert grad[1, 3, 2] == pytest.approx(1.0)


@both_impls
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_invalid_cost_shows_in_the_value(impl: str, bad: float) -> None:
    """A cost of NaN or -inf makes the value of its example NaN, so that training stops. Other examples stay finite."""
    cost = torch.rand(2, 12, 13)
    cost[0, 4, 9] = bad
    value, grad = value_and_grad(cost, 1.0, impl=impl)
    assert value.isnan().tolist() == [True, False]
    assert grad[0].isnan().any()
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("gamma", [1e-3, 1e-2, 0.1, 1.0, 2.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("size", [(40, 51), (220, 200)])
def test_float32_accuracy(gamma: float, size: tuple[int, int]) -> None:
    """With float32 costs, values and gradients are accurate to 1e-6 for every gamma."""
    torch.manual_seed(2)
    cost = torch.rand(3, *size) * 2
    value, grad = value_and_grad(cost.double(), gamma, impl="cpu")
    value32, grad32 = value_and_grad(cost, gamma, impl="cpu")
    torch.testing.assert_close(value32.double(), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad32.double(), grad, rtol=0, atol=1e-6)


def test_small_gamma_is_hard_dtw() -> None:
    """At gamma 1e-3, the value is the cost of the best alignment and the gradient is 1 on its cells."""
    torch.manual_seed(3)
    cost = torch.rand(1, 30, 20, dtype=torch.float64) * 100
    hard = cost[0].clone()
    for i, j in itertools.product(range(30), range(20)):
        before = [hard[p, q] for p, q in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if p >= 0 and q >= 0]
        hard[i, j] += min(before, default=torch.tensor(0.0))
    for impl in IMPLS:
        value, grad = value_and_grad(cost, 1e-3, impl=impl)
        assert value.item() == pytest.approx(hard[-1, -1].item(), abs=1e-2)
        assert (grad * (1 - grad)).abs().max() < 1e-3


@both_impls
def test_a_single_row_is_a_plain_sum(impl: str) -> None:
    """With one row there is only one path, so the value is the sum of the costs for every gamma."""
    cost = torch.rand(2, 1, 900)
    for gamma in (1e-3, 1e4):
        value, grad = value_and_grad(cost, gamma, impl=impl)
        torch.testing.assert_close(value, cost.double().sum((1, 2)).float(), rtol=2e-6, atol=0)
        torch.testing.assert_close(grad, torch.ones_like(cost))


@both_impls
def test_costs_of_every_size(impl: str) -> None:
    """The compiled kernel uses another algorithm for costs above a few gamma. Both must give accurate results."""
    torch.manual_seed(6)
    cost = torch.rand(6, 21, 34) * torch.tensor([1e-30, 1.0, 3.99, 4.01, 50.0, 1e30])[:, None, None]
    cost[1:3] -= 1
    value, grad = value_and_grad(cost.double(), 1.0, impl="naive" if impl == "cpu" else "cpu")
    value32, grad32 = value_and_grad(cost, 1.0, impl=impl)
    torch.testing.assert_close(value32.double(), value, rtol=1e-6, atol=1e-6)
    assert grad32.isfinite().all()
    torch.testing.assert_close(grad32[:5].double(), grad[:5], rtol=0, atol=1e-6)


@both_impls
@pytest.mark.parametrize("shape", [(3000, 7), (1100, 30), (1500, 1100)])
def test_lengths_of_a_thousand(impl: str, shape: tuple[int, int]) -> None:
    """Sequences longer than 1,024 tokens are supported, and errors do not grow with the length."""
    n, m = shape
    if impl == "naive" and m > 100:
        pytest.skip("slow in plain torch")
    value, grad = value_and_grad(torch.zeros(1, n, m), 1.0, impl=impl)
    # the Delannoy number: sum over d of C(m - 1, d) C(n + m - 2 - d, m - 1)
    last, d = torch.tensor(m - 1.0, dtype=torch.float64), torch.arange(m, dtype=torch.float64)
    log_paths = torch.logsumexp(_log_choose(last, d) + _log_choose(n - 1 + last - d, last), 0)
    assert value.item() == pytest.approx(-log_paths.item(), rel=1e-6)
    assert grad[0, 0, 0].item() == pytest.approx(1.0, abs=2e-6)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


@both_impls
def test_many_threads_change_nothing(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are the same to the last bit for any number of threads, so that runs can be reproduced."""
    monkeypatch.setattr(importlib.import_module("dwakd.kernels.soft_dtw.cpu"), "_CELLS_PER_THREAD", 1)
    torch.manual_seed(4)
    cost = torch.rand(7, 150, 160)
    lengths = torch.randint(100, 151, (7,)), torch.randint(130, 161, (7,))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(value_and_grad(cost, 0.5, *lengths, impl=impl))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both_impls
def test_views_and_scaled_gradients(impl: str) -> None:
    """Transposed, strided and expanded costs give the right values, and the upstream gradient scales each example."""
    torch.manual_seed(5)
    whole = torch.rand(6, 20, 12, dtype=torch.float64)
    view = whole[::2].transpose(1, 2).requires_grad_()
    value = soft_dtw(view, 0.5, impl=impl)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (grad,) = torch.autograd.grad(value, view, factors)
    plain_value, plain_grad = value_and_grad(view.detach().contiguous(), 0.5, impl=impl)
    torch.testing.assert_close(value.detach(), plain_value)
    torch.testing.assert_close(grad, plain_grad * factors[:, None, None])
    assert soft_dtw(whole[:1].expand(4, 20, 12), 0.5, impl=impl).unique().numel() == 1


@both_impls
def test_backward_twice_over_a_kept_graph(impl: str) -> None:
    """A second backward pass over a retained graph gives the same gradient, because the saved weights are not changed."""
    cost = torch.rand(2, 9, 9, requires_grad=True)
    value = soft_dtw(cost, 1.0, impl=impl).sum()
    first, second = (torch.autograd.grad(value, cost, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@both_impls
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    """Half-precision costs are computed in float32. The gradient has the dtype of the costs."""
    cost = torch.rand(2, 64, 64).to(dtype)
    value, grad = value_and_grad(cost, 2.0, impl=impl)
    expected, expected_grad = value_and_grad(cost.float(), 2.0, impl=impl)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=0, atol=0)


@both_impls
def test_without_gradient(impl: str) -> None:
    """Without gradients, the values are the same and carry no graph."""
    cost = torch.rand(3, 30, 41, requires_grad=True)
    with torch.no_grad():
        value = soft_dtw(cost, 1.0, impl=impl)
    assert not value.requires_grad
    torch.testing.assert_close(value, soft_dtw(cost, 1.0, impl=impl).detach(), rtol=0, atol=0)


@both_impls
def test_empty_batch(impl: str) -> None:
    """An empty batch gives an empty result without an error."""
    assert soft_dtw(torch.zeros(0, 3, 3), 1.0, impl=impl).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "gpu"}, f"valid are {', '.join(map(repr, get_args(Impl)))}$"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"gamma": math.nan}, "gamma must be positive"),
        ({"x_lengths": torch.tensor([2, 0])}, r"x_lengths\[1\] .*got 0"),
        ({"y_lengths": torch.tensor([4, 1])}, r"y_lengths\[0\] .*got 4"),
        ({"cost": torch.zeros(2, 2, 0)}, r"y_lengths\[0\] .*got 0"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    """Invalid arguments raise a ValueError that names the argument and its value."""
    arguments: dict[str, object] = {"cost": torch.zeros(2, 2, 3), "gamma": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        soft_dtw(**arguments)  # type: ignore[arg-type]


def test_auto_falls_back_once_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without numba, "auto" selects the naive kernel and logs the reason once."""
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "dwakd.kernels.soft_dtw.cpu", raising=False)
    monkeypatch.delitem(sys.modules, "dwakd.kernels.compiled", raising=False)
    is_usable.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert soft_dtw(EXAMPLE, 1.0).item() == pytest.approx(0.232940, abs=1e-6)
        assert len(caplog.records) == 1
        assert "numba" in caplog.text
        with pytest.raises(ImportError, match="numba"):
            soft_dtw(EXAMPLE, 1.0, impl="cpu")
    finally:
        is_usable.cache_clear()


def test_auto_takes_the_compiled_kernel() -> None:
    """With "auto", the compiled kernel is selected. An unsupported device raises a ValueError."""
    cost = torch.rand(2, 30, 40)
    assert torch.equal(soft_dtw(cost, 1.0), soft_dtw(cost, 1.0, impl="cpu"))
    assert not torch.equal(soft_dtw(cost, 1.0), soft_dtw(cost, 1.0, impl="naive"))
    with pytest.raises(ValueError, match=r"'cpu' .*meta"):
        soft_dtw(cost.to("meta"), 1.0, impl="cpu")


def test_the_gradient_holds_no_denormal_numbers():
    """Gradients below 1e-30 are set to 0, because denormal numbers make later matrix products up to a hundred times slower."""
    cost = (2 * torch.rand(2, 140, 140, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_dtw(cost, 0.5, impl="cpu").sum(), cost)
    tiny = torch.finfo(torch.float32).tiny
    assert ((gradient == 0) | (gradient >= tiny)).all()
    assert (gradient == 0).any()
    (expected,) = torch.autograd.grad(soft_dtw(cost.double(), 0.5, impl="naive").sum(), cost)
    assert ((expected > 0) & (expected < tiny)).any()
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)
