"""Test the divergences against the specification's table and their mathematical properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwakd.losses.divergences import DIVERGENCES, SKEWED, adaptive_kl, divergence

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
    """The values equal those of the specification at two temperatures."""
    value = divergence(name, 0.1)((TEACHER / temperature).log_softmax(-1), (STUDENT / temperature).log_softmax(-1))
    assert value.item() == pytest.approx(TABLE[name][temperature - 1], abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_only_where_equal_and_finite_gradient_there(name):
    """Equal distributions have divergence 0 and zero gradient; different ones have a positive divergence."""
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    log_q = logits.log_softmax(-1)
    value = divergence(name, 0.1)(log_q.detach(), log_q)
    assert value.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.abs().max() < 1e-12
    assert (divergence(name, 0.1)(log_q.detach().flip(-1), log_q) > 0).all()


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_gradient(name):
    """The gradient agrees with finite differences. The adaptive KL is left out, because its weights are constants."""
    torch.manual_seed(1)
    log_p = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: divergence(name, 0.1)(log_p, z.log_softmax(-1)), logits)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_skew_applies_to_the_skewed_divergences(name):
    """`skew` changes the value of the skewed divergences and of no other one."""
    log_p, log_q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
    same = torch.equal(divergence(name, 0.1)(log_p, log_q), divergence(name, 0.3)(log_p, log_q))
    assert same == (name not in SKEWED)


def test_bounds_and_limits():
    """The skewed divergences and Jensen-Shannon are bounded, and skews of 0 and 1 give the plain KL and 0."""
    log_p, log_q = (torch.randn(50, 30).mul(30).log_softmax(-1) for _ in range(2))
    for kind in ("forward", "reverse"):
        skewed, plain = f"skewed_{kind}_kl", f"{kind}_kl"
        torch.testing.assert_close(divergence(skewed, 0.0)(log_p, log_q), divergence(plain, 0.1)(log_p, log_q))
        assert divergence(skewed, 1.0)(log_p, log_q).abs().max() < 1e-4
        assert divergence(skewed, 0.1)(log_p, log_q).max() <= -math.log(0.1) + 1e-5
    assert divergence("jensen_shannon", 0.1)(log_p, log_q).max() <= math.log(2) + 1e-5
    assert torch.isfinite(adaptive_kl(log_p, log_q)).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_that_both_forbid_have_no_effect(name):
    """Tokens with -inf in both distributions have no effect and get zero gradient, not NaN."""
    torch.manual_seed(0)
    logits, forbidden = torch.randn(2, 3, 7, dtype=torch.float64), torch.tensor([2, 5])
    allowed = torch.tensor([0, 1, 3, 4, 6])
    results = []
    for given_logits in (logits.index_fill(-1, forbidden, -torch.inf), logits[..., allowed]):
        leaf = given_logits.requires_grad_()
        value = divergence(name, 0.1)(*leaf.log_softmax(-1))
        results.append((value, *torch.autograd.grad(value.sum(), leaf)))
    (value, gradient), expected = results
    assert gradient[..., forbidden].eq(0).all()
    torch.testing.assert_close((value, gradient[..., allowed]), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("forbidding", ["p", "q"])
def test_a_token_that_one_side_forbids(name, forbidding):
    """If one distribution has -inf for a token, the value is that of the formula, which may be infinite.

    If the value is finite, the gradient is finite, too.
    """
    p, q = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.2, 0.3]], dtype=torch.float64)
    p, q = (p, q) if forbidding == "p" else (q, p)

    def kl(a, b):
        return sum((x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0), torch.zeros(()))

    mixed = {share: share * p + (1 - share) * q for share in (0.1, 0.5, 0.9)}
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "skewed_forward_kl": kl(p, mixed[0.1]),
        "skewed_reverse_kl": kl(q, mixed[0.9]),
        "jensen_shannon": (kl(p, mixed[0.5]) + kl(q, mixed[0.5])) / 2,
        "adaptive_kl": torch.tensor(math.inf),
    }[name]
    logits = q.log()[None].requires_grad_()
    value = divergence(name, 0.1)(p.log()[None], logits.log_softmax(-1))
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, logits)
    if expected.isfinite():
        assert gradient.isfinite().all()
        assert gradient.sum().abs() < 1e-12  # adding a constant to all logits does not change the value


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    forbidden=st.integers(0, 5),
    skew=st.floats(0.0, 1.0),
    name=st.sampled_from(sorted(DIVERGENCES)),
)
def test_never_negative(seed, scale, forbidden, skew, name):
    """No divergence is negative, for any scale of the logits and any number of forbidden tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) * scale
    log_p, log_q = logits.index_fill(-1, torch.arange(forbidden), -torch.inf).log_softmax(-1)
    value = divergence(name, skew)(log_p, log_q)
    assert (value >= -1e-12 * scale).all()
