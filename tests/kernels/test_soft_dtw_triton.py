"""Test the Triton kernel of Soft-DTW against the naive version; without a GPU, Triton's interpreter runs it."""

import importlib

import pytest
import torch
from torch import Tensor

from dwakd.kernels import soft_dtw

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytestmark = pytest.mark.skipif(
        not importlib.import_module("triton").knobs.runtime.interpret,
        reason="triton was imported without its interpreter",
    )
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def value_and_grad(cost: Tensor, gamma: float, *lengths: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    cost = cost.detach().to(DEVICE).requires_grad_()
    value = soft_dtw(cost, gamma, *(side.to(DEVICE) for side in lengths), impl=impl)
    (grad,) = torch.autograd.grad(value.sum(), cost)
    return value.detach().cpu(), grad.cpu()


def assert_twins_agree(cost: Tensor, gamma: float, *lengths: Tensor, **tolerance: float) -> tuple[Tensor, Tensor]:
    value, grad = value_and_grad(cost, gamma, *lengths, impl="triton")
    expected, expected_grad = value_and_grad(cost.double(), gamma, *lengths, impl="naive")
    torch.testing.assert_close(value.double(), expected, **tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, **tolerance)
    return value, grad


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 1e3])
def test_kernels_agree_on_a_ragged_batch(gamma: float) -> None:
    """Values and gradients of a ragged batch equal those of the naive version, whatever the padding contains."""
    torch.manual_seed(0)
    lengths = torch.tensor([11, 1, 7, 5, 1]), torch.tensor([9, 6, 1, 9, 1])
    cost = torch.rand(5, 11, 9) * 2
    cost[0, 3:6, 2] = torch.inf
    cost[3, :, 4] = torch.inf  # no path
    cost[2, 7:] = torch.nan
    cost[1, :, 6:] = torch.nan
    value, grad = assert_twins_agree(cost, gamma, *lengths, rtol=1e-6, atol=1e-6)
    assert value.isinf().tolist() == [False, False, False, True, False]
    assert grad[3].eq(0).all()
    assert grad[0, 3:6, 2].eq(0).all()


def test_double_precision() -> None:
    """With float64 costs, the whole computation is in float64."""
    torch.manual_seed(1)
    assert_twins_agree(torch.randn(2, 7, 10, dtype=torch.float64), 0.3, rtol=1e-12, atol=1e-12)


def test_rows_beyond_a_block_and_a_hard_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences longer than a block and a hard band, outside of which cells are skipped, give the same results."""
    kernel = importlib.import_module("dwakd.kernels.soft_dtw.triton")
    monkeypatch.setattr(kernel, "_LARGEST_BLOCK", 16)
    torch.manual_seed(2)
    cost = torch.rand(2, 20, 18)
    i, j = torch.arange(20)[:, None], torch.arange(18)
    cost[0, (i - j).abs() > 2] = torch.inf
    value, _ = assert_twins_agree(cost, 0.1, rtol=1e-6, atol=1e-6)
    assert value.isfinite().all()


def test_invalid_costs_lengths_and_views() -> None:
    """NaN and -inf in the costs and lengths out of range make the value NaN. Strided costs are supported."""
    torch.manual_seed(3)
    cost = torch.rand(4, 6, 5).to(torch.bfloat16).transpose(1, 2)
    cost[0, 2, 3] = torch.nan
    cost[1, 0, 0] = -torch.inf
    value, grad = value_and_grad(cost, 1.0, impl="triton")
    expected, expected_grad = value_and_grad(cost, 1.0, impl="naive")
    assert value.isnan().tolist() == [True, True, False, False]
    assert grad[0].isnan().any()
    torch.testing.assert_close(value[2:], expected[2:])
    torch.testing.assert_close(grad[2:], expected_grad[2:])
    solve = importlib.import_module("dwakd.kernels.soft_dtw.triton").solve
    lengths = torch.tensor([5, 6, 0, 5], device=DEVICE), torch.tensor([6, 6, 6, -1], device=DEVICE)
    value, _ = solve(torch.rand(4, 5, 6, device=DEVICE), 1.0, *lengths, True)
    assert value.isnan().tolist() == [False, True, True, True]
    lengths = torch.tensor([4], device=DEVICE).expand(3), torch.tensor([[5, 9], [4, 9], [5, 9]], device=DEVICE)[:, 0]
    starts = torch.arange(5, device=DEVICE)[:, None].expand(5, 3).T
    for width, own in ((6, {}), (2, {"starts": starts})):
        cost = torch.rand(3, 5, width, device=DEVICE)
        values = [soft_dtw(cost, 1.0, *lengths, impl=impl, **own) for impl in ("triton", "naive")]
        torch.testing.assert_close(*values)


def test_without_gradient() -> None:
    """Without gradients, the value equals that of the naive version."""
    cost = torch.rand(1, 4, 5, device=DEVICE)
    assert soft_dtw(cost, 1.0, impl="triton").item() == pytest.approx(
        soft_dtw(cost, 1.0, impl="naive").item(), abs=1e-6
    )


@pytest.mark.parametrize("gamma", [1e-3, 2.0])
def test_bands(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    """A ragged batch of bands, flat and steep ones and one without a path, equals the naive version."""
    kernel = importlib.import_module("dwakd.kernels.soft_dtw.triton")
    monkeypatch.setattr(kernel, "_LARGEST_BLOCK", 16)
    torch.manual_seed(4)
    starts = torch.zeros(4, 22, dtype=torch.long)
    starts[0] = torch.arange(22)
    starts[1, 3:] = 3  # a jump, then none
    starts[2] = torch.arange(22) // 4 * 3
    lengths = torch.tensor([22, 9, 20, 22]), torch.tensor([25, 7, 14, 4])
    cost = torch.rand(4, 22, 4) * 2
    cost[3, 8] = torch.inf
    cost[(starts[..., None] + torch.arange(4)) >= lengths[1][:, None, None]] = torch.nan
    results = []
    for impl in ("triton", "naive"):
        leaf = cost.to(DEVICE).requires_grad_()
        value = soft_dtw(leaf, gamma, *(side.to(DEVICE) for side in lengths), impl=impl, starts=starts.to(DEVICE))
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=2e-6)
    assert results[0][0].isinf().tolist() == [False, False, False, True]
    assert results[0][1].isfinite().all()
