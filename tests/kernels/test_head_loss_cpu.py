"""The compiled sweeps of a softened pair against their twin in plain torch."""

import logging
import math
import sys

import pytest
import torch

from dwakd.kernels.head_loss import statistics
from dwakd.kernels.head_loss.statistics import SoftenedPair
from dwakd.kernels.usable import is_usable

temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])


@pytest.fixture(autouse=True)
def compiled_from_the_first_logit(monkeypatch):
    monkeypatch.setattr(statistics, "COMPILED_FROM", 1)


def pair_of_sides(vocab, tokens, dtype=torch.float32, seed=0):
    """Two sides that share one buffer, each a strided view; the last column belongs to neither."""
    buffer = torch.randn(vocab, 2 * tokens + 1, generator=torch.Generator().manual_seed(seed)) * 4
    buffer[:, -1] = math.nan  # must not be read
    buffer = buffer.to(dtype)
    return buffer[:, :tokens], buffer[:, tokens : 2 * tokens]


def swept(pair, sides):
    """What `observe` returns and leaves, one row for each token."""
    own, other, kl = pair.observe(*sides, entropy_of=sides[0], totals_of=sides)
    sums = torch.stack([own.total, own.soft_total, own.energy, other.total, other.soft_total, kl])
    return torch.cat([sums, *sides]).double()


def shares(count, tokens, dtype=torch.float32):
    return list(torch.rand(count, tokens, generator=torch.Generator().manual_seed(1)).to(dtype))


def assert_compiled(pair, sides):
    assert pair._is_compiled(*sides)  # else torch would be compared with itself


@temperatures
@pytest.mark.parametrize("vocab", [1, 63, 5000])
@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 33])
def test_the_compiled_sweep_is_its_twin(vocab, tokens, temperature):
    """Every width has another rest beside whole vectors; a sum of the wrong side shifts the loss by less than noise."""
    pair, sides = SoftenedPair(temperature), pair_of_sides(vocab, tokens)
    assert_compiled(pair, sides)
    expected = swept(pair, pair_of_sides(vocab, tokens, torch.float64))
    torch.testing.assert_close(swept(pair, sides), expected, rtol=2e-6, atol=2e-6)


@temperatures
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 33])
def test_the_compiled_gradient_is_its_twin(tokens, count, temperature):
    """Of the teacher's space, which leaves the target alone, and of the student's, which overwrites both sides."""
    pair, results = SoftenedPair(temperature), []
    for dtype in (torch.float32, torch.float64):
        sides = pair_of_sides(5000, tokens, dtype)
        for side in sides:
            side.sigmoid_()
        assert pair._is_compiled(*sides) == (dtype == torch.float32)
        pair.differentiate(*sides, shares(count, tokens, dtype))
        results.append(torch.cat(sides).double())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@temperatures
def test_the_exponential_is_exact_to_a_float(temperature):
    """An error that all logits share would pass for another temperature."""
    logits = torch.linspace(-80, 0, 20_001)[:, None].repeat(1, 2).contiguous()
    exact = (logits.double() / temperature).exp()
    SoftenedPair(temperature).observe(logits, logits.clone(), entropy_of=None, totals_of=())
    scaled = (-logits.double().log() + exact.log()).abs().max()
    # the exponent itself is a float32: half a unit in the last place of up to 115 (log2) is 3e-6
    assert scaled < 6e-6
    near = exact[:, 0] > 0.5
    torch.testing.assert_close(logits.double()[near], exact[near], rtol=3e-7, atol=0)


@temperatures
def test_forbidden_tokens_add_nothing(temperature):
    """0 x log 0 is 0, also where a logit is -inf or as low as float32 goes."""
    pair = SoftenedPair(temperature)
    short, sides = pair_of_sides(99, 9), pair_of_sides(101, 9)
    for part, side in zip(short, sides, strict=True):
        side[:99], side[99], side[100] = part, -math.inf, torch.finfo(torch.float32).min / 16
    expected, got = swept(pair, short), swept(pair, sides)
    torch.testing.assert_close(got[:6], expected[:6])
    assert got[-2:].abs().max() == 0


@temperatures
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_stays_and_spreads_to_its_token_alone(side, wrong, temperature):
    """A diverged student must reach the loss, or training goes on with it."""
    pair, sides = SoftenedPair(temperature), pair_of_sides(99, 20)
    sides[side][5, 3] = sides[side][5, 17] = wrong
    _, _, kl = pair.observe(*sides, entropy_of=sides[0], totals_of=sides)
    assert kl.isnan().nonzero().flatten().tolist() == [3, 17]
    assert sides[side][5, [3, 17]].isnan().all()
    pair.differentiate(*sides, [1 / (s + kl) for s in shares(4, 20)])
    assert sides[0].isnan().any(0).nonzero().flatten().tolist() == [3, 17]


def test_threads_change_no_bit():
    """A run that cannot be repeated cannot be compared with another."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            pair, sides = SoftenedPair(2.0), pair_of_sides(20_000, 33)
            sums = swept(pair, sides)
            pair.differentiate(*sides, shares(4, 33))
            results.append(torch.cat([sums, *sides]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("temperature", "dtype", "transpose"),
    [(0.5, torch.float32, False), (3.0, torch.float32, False), (2.0, torch.float64, False), (2.0, torch.float32, True)],
)
def test_what_is_not_compiled_runs_in_torch(temperature, dtype, transpose):
    """Read as float32 with neighbouring columns, it would be another distribution."""
    sides = pair_of_sides(40, 40, dtype)
    if transpose:
        sides = tuple(side.t() for side in sides)
    assert not SoftenedPair(temperature)._is_compiled(*sides)
    x = (sides[1] / temperature).double().log_softmax(0)
    y = (sides[0] / temperature).double().log_softmax(0)
    _, _, kl = SoftenedPair(temperature).observe(*sides, entropy_of=None, totals_of=())
    torch.testing.assert_close(kl.double(), (x.exp() * (x - y)).sum(0), rtol=1e-4, atol=1e-5)


def test_without_numba_the_sweep_is_torchs(monkeypatch, caplog):
    """Slower, and the user reads why, once."""
    for name in ("numba", "dwakd.kernels.head_loss.cpu_sweep"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dwakd.kernels.head_loss.cpu", raising=False)
    is_usable.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [SoftenedPair(2.0)._is_compiled(torch.zeros(2**14, 8)) for _ in range(2)] == [False, False]
        assert len(caplog.records) == 1
        assert all(part in caplog.text for part in ("head_loss runs in plain torch", "because numba"))
    finally:
        is_usable.cache_clear()
    monkeypatch.undo()
    assert SoftenedPair(2.0)._is_compiled(torch.zeros(2**14, 8))
