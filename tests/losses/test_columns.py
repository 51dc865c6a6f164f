"""Test the sums over the vocabulary against plain torch, with several blocks and a forbidden token."""

import math

import pytest
import torch

from dwakd.kernels.head_loss import statistics
from dwakd.losses.columns import cross_entropy, entropy, log_probs_at, log_total


@pytest.fixture
def columns(monkeypatch):
    """Return logits (vocab, tokens) that form three blocks and forbid one token."""
    monkeypatch.setattr(statistics, "CPU_BLOCK", 20)
    values = 5 * torch.randn(11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[7] = -math.inf
    return values.requires_grad_()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_value_and_gradient_are_those_of_logsumexp(columns, temperature):
    """Value and gradient of `log_total` equal those of `logsumexp` at several temperatures."""
    upstream = torch.arange(1.0, 5.0, dtype=torch.float64)
    results = []
    for value in (log_total(columns, temperature), (columns / temperature).logsumexp(0)):
        results.append((value, torch.autograd.grad(value @ upstream, columns)[0]))
    torch.testing.assert_close(*results)
    assert (results[0][1][7] == 0).all()


def test_log_probs_and_entropy(columns):
    """Log-probabilities, cross-entropy and entropy equal those of `log_softmax`."""
    expected = columns.log_softmax(0)
    ids = torch.tensor([[0, 1, 2, 3], [9, 9, 10, 4]])
    torch.testing.assert_close(log_probs_at(columns, ids), expected.gather(0, ids))
    torch.testing.assert_close(cross_entropy(columns, ids[0]), -expected.gather(0, ids[:1])[0])
    torch.testing.assert_close(entropy(columns), torch.special.entr(expected.exp()).sum(0))
    assert not entropy(columns).requires_grad
