"""Test the Soft-DTW divergences of two sequences in special cases."""

import pytest
import torch

from dwakd.kernels import soft_dtw
from dwakd.losses import alignment, attention, build_loss
from dwakd.losses.alignment import soft_dtw_divergences, unit_rows
from dwakd.losses.sides import pad_rows, valid
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side


def test_zero_row_has_no_gradient():
    """A zero vector, such as an untrained embedding, stays zero and gets a bounded gradient."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = unit_rows(rows, torch.tensor([2]), 2)
    assert torch.equal(unit.detach(), torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))
    unit.sum().backward()
    assert torch.isfinite(rows.grad).all()
    assert rows.grad.abs().max() <= 1


def test_self_terms_carry_the_whole_gradient():
    """The gradient includes the self terms of both sides, although it is computed with half of them."""
    torch.manual_seed(0)
    lengths = torch.tensor([4, 2]), torch.tensor([3, 5])
    x, y = (torch.randn(int(side.sum()), 6, dtype=torch.float64, requires_grad=True) for side in lengths)
    band = torch.rand(2, 4, 5, dtype=torch.float64).round()
    (scores,) = soft_dtw_divergences([(x, y)], *lengths, gamma=0.7, band=band)

    expected = []
    for a, b, penalty in zip(x.split([4, 2]), y.split([3, 5]), band, strict=True):
        a, b = (torch.nn.functional.normalize(side, dim=-1) for side in (a, b))
        cross = soft_dtw((1 - a @ b.T + penalty[: len(a), : len(b)])[None], 0.7)
        own_a, own_b = (soft_dtw((1 - side @ side.T)[None], 0.7) for side in (a, b))
        expected.append(cross - (own_a + own_b) / 2)
    expected = torch.cat(expected)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(value.sum(), (x, y)) for value in (scores, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dskd", "dwa_kd", "dwa_kd_v2"])
def test_padding_has_no_effect(name, monkeypatch):
    """The padding of a ragged batch changes neither the terms nor the gradients."""
    torch.manual_seed(0)
    loss = build_loss(name, {}, widths=WIDTHS, pair=pair_of(random_heads())).double()
    examples, heads = random_examples([(5, 7), (9, 4), (1, 2)]), random_heads()
    hidden = [example["student_hidden"].requires_grad_() for example in examples]
    results = []
    for poison in (0.0, 1e9):

        def padded(rows, lengths, length, poison=poison):
            return pad_rows(rows, lengths, length).masked_fill(~valid(lengths, length)[..., None], poison)

        for module in (alignment, attention):
            monkeypatch.setattr(module, "pad_rows", padded)
        output = loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1]))
        results.append((output.terms, torch.autograd.grad(output.loss, hidden)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
