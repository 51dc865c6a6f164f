"""Compute Sinkhorn transport costs of a padded batch; the backward pass needs vectors per iteration, not matrices.

With K = -C / regularisation and marginals a and b, the plan is exp(K + f + g). Starting from g = 0, each iteration
computes f = log a - logsumexp_j(K + g) and then g = log b - logsumexp_i(K + f).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Matrices = Float[Tensor, "batch n m"]
Vectors = Float[Tensor, "batch _"]


def sinkhorn_batched(
    cost: Matrices,
    regularisation: float,
    iterations: int,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Compute the costs of all examples at once; arguments and guarantees are those of `dwakd.kernels.sinkhorn`."""
    log_a = _log_marginal(x_lengths.to(cost.device), cost.shape[1], cost.dtype)
    log_b = _log_marginal(y_lengths.to(cost.device), cost.shape[2], cost.dtype)
    inside = log_a.isfinite()[:, :, None] & log_b.isfinite()[:, None, :]
    value: Tensor = _Sinkhorn.apply(  # type: ignore[no-untyped-call]
        cost.masked_fill(~inside, 0.0), regularisation, iterations, log_a, log_b
    )
    return value


def _log_marginal(lengths: Int[Tensor, " batch"], size: int, dtype: torch.dtype) -> Vectors:
    """Return log(1 / length) within an example and -inf beyond its length."""
    outside = torch.arange(size, device=lengths.device) >= lengths[:, None]
    return (-lengths.to(dtype).log())[:, None].expand(-1, size).masked_fill(outside, -torch.inf)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, regularisation: float, iterations: int, log_a: Tensor, log_b: Tensor) -> Tensor:
        kernel = -cost / regularisation
        # before their marginal is added, the vectors are finite beyond the lengths
        g = torch.where(log_b.isfinite(), 0.0, log_b)
        history = []
        for _ in range(iterations):
            u = -(kernel + g[:, None, :]).logsumexp(2)
            f = u + log_a
            v = -(kernel + f[:, :, None]).logsumexp(1)
            history.append((u, f, g, v))
            g = v + log_b
        plan = (kernel + f[:, :, None] + g[:, None, :]).exp()
        ctx.save_for_backward(cost, plan, *(vector for step in history for vector in step))
        ctx.regularisation = regularisation
        return (plan * cost).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None, None, None]:
        cost, plan, *vectors = ctx.saved_tensors
        kernel = -cost / ctx.regularisation
        flow = plan * cost  # d value / d (K + f + g)
        grad_kernel, grad_f, grad_g = flow.clone(), flow.sum(2), flow.sum(1)
        for step in range(len(vectors) - 4, -1, -4):
            u, f, g, v = vectors[step : step + 4]
            share = (kernel + f[:, :, None] + v[:, None, :]).exp_().mul_(grad_g[:, None, :])
            grad_kernel.sub_(share)
            grad_f = grad_f - share.sum(2)
            share = (kernel + g[:, None, :] + u[:, :, None]).exp_().mul_(grad_f[:, :, None])
            grad_kernel.sub_(share)
            grad_g, grad_f = -share.sum(1), torch.zeros_like(grad_f)
        grad_cost = plan - grad_kernel / ctx.regularisation
        return grad_cost * grad_value[:, None, None], None, None, None, None
