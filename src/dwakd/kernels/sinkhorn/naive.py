"""Compute Sinkhorn transport costs in plain torch, example by example: the specification of the batched kernel."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sinkhorn_naive(
    cost: Float[Tensor, "batch n m"],
    regularisation: float,
    iterations: int,
    x_lengths: Int[Tensor, " batch"],
    y_lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Compute the costs with autograd; arguments and guarantees are those of `dwakd.kernels.sinkhorn`."""
    values = []
    for matrix, rows, columns in zip(cost, x_lengths.tolist(), y_lengths.tolist(), strict=True):
        own = matrix[:rows, :columns]
        log_plan = -own / regularisation
        for _ in range(iterations):
            log_plan = log_plan.log_softmax(1) - math.log(rows)
            log_plan = log_plan.log_softmax(0) - math.log(columns)
        values.append((log_plan.exp() * own).sum())
    return torch.stack(values) if values else cost.sum((1, 2))
