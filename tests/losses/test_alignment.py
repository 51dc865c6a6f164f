"""Costs of the alignment at the edges of the cosine."""

import torch

from dwakd.losses.alignment import unit_rows


def test_zero_row_has_no_gradient():
    """A new padding or end token has a zero embedding: an epsilon in its norm gives a gradient of 1e12."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = unit_rows(rows, torch.tensor([2]), 2)
    assert torch.equal(unit.detach(), torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))
    unit.sum().backward()
    assert torch.isfinite(rows.grad).all()
    assert rows.grad.abs().max() <= 1
