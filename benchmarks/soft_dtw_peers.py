"""Wrap other implementations of Soft-DTW as differentiable functions of costs, gamma and lengths."""

import importlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

Peer = Callable[[Tensor, float, Tensor, Tensor], Tensor]


@numba.njit(parallel=True, cache=True)
def _row_order(cost, lengths, gamma):
    """Compute all of R cell by cell, one example per thread, as pytorch-softdtw-cuda does on a CPU."""
    reached = np.full((cost.shape[0], cost.shape[1] + 2, cost.shape[2] + 2), np.inf)
    for b in numba.prange(cost.shape[0]):
        n, m = lengths[b]
        reached[b, 0, 0] = 0.0
        for j in range(1, m + 1):
            for i in range(1, n + 1):
                corner, up, left = (
                    -reached[b, i - 1, j - 1] / gamma,
                    -reached[b, i - 1, j] / gamma,
                    -reached[b, i, j - 1] / gamma,
                )
                highest = max(corner, up, left)
                total = np.exp(corner - highest) + np.exp(up - highest) + np.exp(left - highest)
                reached[b, i, j] = cost[b, i - 1, j - 1] - gamma * (np.log(total) + highest)
    return reached


@numba.njit(parallel=True, cache=True)
def _row_order_backward(cost, reached, lengths, gamma):
    batch, rows, columns = cost.shape
    padded = np.zeros((batch, rows + 2, columns + 2))
    padded[:, 1 : rows + 1, 1 : columns + 1] = cost
    share = np.zeros((batch, rows + 2, columns + 2))
    for b in numba.prange(batch):
        n, m = lengths[b]
        padded[b, n + 1, :], padded[b, :, m + 1] = 0.0, 0.0
        reached[b, n + 1, :], reached[b, :, m + 1] = -np.inf, -np.inf
        reached[b, n + 1, m + 1], share[b, n + 1, m + 1] = reached[b, n, m], 1.0
        for j in range(m, 0, -1):
            for i in range(n, 0, -1):
                here = reached[b, i, j]
                down = np.exp((reached[b, i + 1, j] - here - padded[b, i + 1, j]) / gamma)
                right = np.exp((reached[b, i, j + 1] - here - padded[b, i, j + 1]) / gamma)
                across = np.exp((reached[b, i + 1, j + 1] - here - padded[b, i + 1, j + 1]) / gamma)
                share[b, i, j] = (
                    share[b, i + 1, j] * down + share[b, i, j + 1] * right + share[b, i + 1, j + 1] * across
                )
        share[b, n + 1, m + 1] = 0.0
    return share[:, 1 : rows + 1, 1 : columns + 1]


class _RowOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, lengths: Tensor) -> Tensor:
        reached = torch.from_numpy(_row_order(cost.detach().numpy(), lengths.numpy(), gamma)).to(cost.dtype)
        ctx.save_for_backward(cost, reached, lengths)
        ctx.gamma = gamma
        return reached[torch.arange(len(cost)), lengths[:, 0], lengths[:, 1]]

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        cost, reached, lengths = ctx.saved_tensors
        share = _row_order_backward(cost.detach().numpy(), reached.numpy(), lengths.numpy(), ctx.gamma)
        return grad_value[:, None, None] * torch.from_numpy(share).to(cost.dtype), None, None


def numba_batched(cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    return _RowOrder.apply(cost, gamma, torch.stack((x_lengths, y_lengths), 1))


def numba_one_by_one(cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    """Call `numba_batched` for each example alone, cut to its lengths, as the published DWA-KD code does."""
    sizes = zip(x_lengths.tolist(), y_lengths.tolist(), strict=True)
    return torch.cat(
        [numba_batched(cost[b : b + 1, :n, :m], gamma, *torch.tensor([[n], [m]])) for b, (n, m) in enumerate(sizes)]
    )


def pysdtw(cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    function = importlib.import_module("pysdtw.sdtw_cpu").SoftDTWcpu
    value: Tensor = function.apply(cost, torch.stack((x_lengths, y_lengths), 1), gamma, 0)
    return value


def tslearn(cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    """Call tslearn's loss of given costs, without a constraint; supports equal lengths only."""
    function = importlib.import_module("tslearn.metrics.soft_dtw_loss_pytorch")._SoftDTWLossPyTorch
    value: Tensor = function.apply(cost, gamma)
    return value


def available() -> tuple[dict[str, Peer], list[str]]:
    """Return the peers that can run, by name, and one line of text for each peer that cannot."""
    peers: dict[str, Peer] = {"numba_batched": numba_batched, "numba_one_by_one": numba_one_by_one}
    absent = []
    for name, peer, module in (("pysdtw", pysdtw, "pysdtw.sdtw_cpu"), ("tslearn", tslearn, "tslearn.metrics")):
        try:
            importlib.import_module(module)
            peers[name] = peer
        except ImportError as error:
            absent.append(f"{name} is left out, because it cannot be imported: {error}")
    return peers, absent
