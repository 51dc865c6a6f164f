"""A wrong divergence still trains, just towards something else: values against the specification's table."""

import math

import pytest
import torch

from dwakd.losses.divergences import DIVERGENCES, adaptive_kl, divergence

TEACHER = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.5, 1.5, -0.5, 0.0]], dtype=torch.float64)
TABLE = {
    "forward_kl": (0.464760, 0.120806),
    "reverse_kl": (0.454220, 0.117765),
    "jensen_shannon": (0.109535, 0.029418),
    "skewed_forward_kl": (0.362169, 0.096435),
    "skewed_reverse_kl": (0.357344, 0.095002),
    "adaptive_kl": (0.459385, 0.120069),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1, 2])
def test_values_of_the_table(name, temperature):
    """A swapped argument or a missing factor would go unnoticed in training."""
    value = divergence(name, 0.1)((TEACHER / temperature).log_softmax(-1), (STUDENT / temperature).log_softmax(-1))
    assert value.item() == pytest.approx(TABLE[name][temperature - 1], abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_only_where_equal_and_finite_gradient_there(name):
    """Equal distributions give 0 / 0 in the adaptive KL unless guarded: one NaN ends a run."""
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    log_q = logits.log_softmax(-1)
    value = divergence(name, 0.1)(log_q.detach(), log_q)
    assert value.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.abs().max() < 1e-12
    assert (divergence(name, 0.1)(log_q.detach().flip(-1), log_q) > 0).all()


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_gradient(name):
    """Gradient of the learned side, in float64; the adaptive KL holds its two gaps constant, so it has another."""
    torch.manual_seed(1)
    log_p = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: divergence(name, 0.1)(log_p, z.log_softmax(-1)), logits)


def test_bounds_and_limits():
    """Skews of 0 and 1 are the plain divergences and nothing; both skewed forms are bounded by -log(skew)."""
    log_p, log_q = (torch.randn(50, 30).mul(30).log_softmax(-1) for _ in range(2))
    for kind in ("forward", "reverse"):
        skewed, plain = f"skewed_{kind}_kl", f"{kind}_kl"
        torch.testing.assert_close(divergence(skewed, 0.0)(log_p, log_q), divergence(plain, 0.1)(log_p, log_q))
        assert divergence(skewed, 1.0)(log_p, log_q).abs().max() < 1e-4
        assert divergence(skewed, 0.1)(log_p, log_q).max() <= -math.log(0.1) + 1e-5
    assert divergence("jensen_shannon", 0.1)(log_p, log_q).max() <= math.log(2) + 1e-5
    assert torch.isfinite(adaptive_kl(log_p, log_q)).all()
