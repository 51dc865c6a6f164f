"""Test the statistics that overwrite the logits against plain torch in float64."""

import math

import pytest
import torch

from dwakd.kernels.head_loss import statistics
from dwakd.kernels.head_loss.statistics import SoftenedPair, most_probable, peak_of

temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])


def pair_of_sides(vocab, tokens, dtype=torch.float32):
    """Return two sides that are strided views of one buffer. The last column of the buffer belongs to neither."""
    buffer = torch.randn(vocab, 2 * tokens + 1, generator=torch.Generator().manual_seed(0)) * 4
    buffer[:, -1] = math.nan  # must not be read
    buffer = buffer.to(dtype)
    return buffer[:, :tokens], buffer[:, tokens : 2 * tokens]


def observed(pair, sides):
    """Return the results of `observe` with all sums, one per row."""
    own, other, kl = pair.observe(*sides, entropy_of=sides[0], totals_of=sides)
    return torch.stack([own.total, own.soft_total, own.entropy(), other.total, other.soft_total, kl]).double()


def shares(count, tokens, dtype=torch.float32):
    return list(torch.rand(count, tokens, generator=torch.Generator().manual_seed(1)).to(dtype))


@temperatures
@pytest.mark.parametrize(("vocab", "tokens"), [(1, 1), (63, 7), (5000, 33), (300_000, 2)])
def test_sums_of_a_pair(vocab, tokens, temperature):
    """The sums, the entropy and the KL equal those of plain torch for one or several blocks of the vocabulary."""
    sides = pair_of_sides(vocab, tokens)
    x, y = (side.double() for side in sides)
    expected = [(z - z.amax(0)).exp().sum(0) for z in (x, x / temperature, y, y / temperature)]
    entropy = torch.special.entr(x.softmax(0)).sum(0)
    p, q = ((z / temperature).log_softmax(0) for z in (y, x))
    kl = (p.exp() * (p - q)).sum(0)
    expected = torch.stack([*expected[:2], entropy, *expected[2:], kl])
    torch.testing.assert_close(observed(SoftenedPair(temperature), sides), expected, rtol=1e-5, atol=2e-5)


@temperatures
@pytest.mark.parametrize("count", [2, 4])
def test_gradient_of_a_pair(count, temperature):
    """`differentiate` writes the gradient: with two factors to the learned side only, with four to both sides."""
    pair, sides, factors = SoftenedPair(temperature), pair_of_sides(5000, 33), shares(4, 33)
    x, y = (side.double() - side.double().amax(0) for side in sides)
    learned = factors[0] * (x / temperature).exp() - factors[1] * (y / temperature).exp()
    if count == 4:
        learned, target = learned + factors[2] * x.exp(), factors[3] * y.exp()
    observed(pair, sides)
    kept = sides[1].double()
    pair.differentiate(*sides, factors[:count])
    torch.testing.assert_close(sides[0].double(), learned, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(sides[1].double(), target if count == 4 else kept, rtol=1e-5, atol=2e-6)


@temperatures
def test_forbidden_tokens_add_nothing(temperature):
    """Tokens with the finite logit that replaces -inf add 0 to all statistics and get zero gradient."""
    pair, sides = SoftenedPair(temperature), pair_of_sides(101, 9)
    for side in sides:
        side[99:] = torch.finfo(torch.float32).min / 16
    expected = observed(pair, tuple(side[:99].clone() for side in sides))
    torch.testing.assert_close(observed(pair, sides), expected, rtol=1e-5, atol=1e-5)
    assert all(side[99:].abs().max() == 0 for side in sides)


@temperatures
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_stays_and_spreads_to_its_token_alone(side, wrong, temperature):
    """NaN or inf in the logits of a token makes the results of this token NaN, and of no other token."""
    pair, sides = SoftenedPair(temperature), pair_of_sides(99, 20)
    sides[side][5, 3] = sides[side][5, 17] = wrong
    kl = observed(pair, sides)[-1]
    assert kl.isnan().nonzero().flatten().tolist() == [3, 17]
    pair.differentiate(*sides, [1 / (s + kl.float()) for s in shares(4, 20)])
    assert sides[0].isnan().any(0).nonzero().flatten().tolist() == [3, 17]


@pytest.mark.parametrize("shape", [(1, 3), (255, 1), (1000, 7), (5000, 30), (4096, 33), (300_000, 1), (9, 0)])
@pytest.mark.parametrize("block", [1, 2**18])
def test_most_probable_token_and_its_logit(shape, block, monkeypatch):
    """The most probable token is found in every block. Among equal logits, the first one is taken."""
    monkeypatch.setattr(statistics, "CPU_BLOCK", block if shape[0] < 1000 else 2**18)
    torch.manual_seed(0)
    logits = torch.randn(shape).mul(3).round()
    for columns in (logits, torch.cat([torch.randn(shape), logits], 1)[:, shape[1] :]):
        assert torch.equal(most_probable(columns), logits.argmax(0))
        assert torch.equal(peak_of(columns), logits.amax(0))
