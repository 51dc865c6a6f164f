"""Test that a band of the Soft-DTW tables, and attention in blocks of rows, give the results of the full matrices."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dwakd.losses import TeacherScale, attention, banded, build_loss, sides
from dwakd.losses.alignment import soft_dtw_divergences
from dwakd.losses.attention import Focus
from dwakd.losses.band import Band
from dwakd.losses.banded import banded_divergences
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side

COUNTS = (60, 7, 1, 33), (70, 5, 3, 30)


def divergences(counts, focus, *, width, max_border=1e-5, seed=0):
    """Return values and gradients of two pairs from the full tables and from bands, and the mass on the border."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(sum(counts[0]) + sum(counts[1]), 6, generator=generator, dtype=torch.float64)
    pairs = [
        tuple((text[: sum(own)] + scale * text[-sum(own) :]).requires_grad_() for own in counts) for scale in (0.3, 2.0)
    ]
    lengths = tuple(torch.tensor(own) for own in counts)
    band = Band.around(focus, *lengths, base=2.0)
    full = soft_dtw_divergences(pairs, *lengths, gamma=0.5, band=band.penalties(max(counts[1])))
    settings = {"gamma": 0.5, "band": band, "width": width, "max_border": max_border}
    narrow, border = banded_divergences(pairs, counts, **settings)
    results = []
    for scores in (full, narrow):
        factors = torch.arange(1.0, 1 + len(counts[0]), dtype=torch.float64)
        total = torch.stack(scores) @ factors
        grads = torch.autograd.grad(total.sum(), [rows for pair in pairs for rows in pair])
        results.append((torch.stack(scores).detach(), grads))
    return *results, border


def attended(counts, move):
    """Return the focus of attention to the token at the same part of the text, moved."""
    centre = torch.zeros(len(counts[0]), max(counts[0]), dtype=torch.float64)
    for row, (n, m) in enumerate(zip(*counts, strict=True)):
        centre[row, :n] = move(torch.arange(n) * m / n).clamp(0, m - 1)
    return Focus(centre, torch.full_like(centre, 0.3))


def test_a_band_that_covers_the_tables_is_exact():
    """If the band covers the tables of a ragged batch, values and gradients equal those of the full tables."""
    full, narrow, border = divergences(COUNTS, attended(COUNTS, lambda j: j + 3), width=128)
    torch.testing.assert_close(narrow, full, rtol=1e-12, atol=1e-12)
    assert border.eq(0).all()


def test_a_band_is_doubled_until_its_border_is_free(monkeypatch):
    """A band that is too narrow is doubled for the tables concerned, and the result is then close to the full tables."""
    widths = []

    def starts(centre, m, width):
        widths.append(width)
        return band_starts(centre, m, width)

    band_starts = banded.band_starts
    monkeypatch.setattr(banded, "band_starts", starts)
    focus = attended(COUNTS, lambda j: j + 3)
    full, narrow, border = divergences(COUNTS, focus, width=8)
    assert (border <= 1e-5).all()
    assert border.max() > 0  # some table is not covered
    assert widths.count(8) >= 6 * 4
    assert 0 < widths.count(16) < 6 * 4
    torch.testing.assert_close(narrow[0], full[0], rtol=1e-4, atol=1e-4)
    scale = torch.cat(full[1]).abs().max()
    assert (torch.cat(narrow[1]) - torch.cat(full[1])).abs().max() < 1e-4 * scale
    _, kept, free = divergences(COUNTS, focus, width=8, max_border=10.0)
    assert free.max() > 1e-3  # the mass on the border shows that the band is too narrow
    assert (torch.cat(kept[1]) - torch.cat(full[1])).abs().max() > 1e-4 * scale


def test_attention_that_is_far_from_the_alignment(monkeypatch):
    """If attention points to the wrong part of the text, as before training, the band around the diagonal is used."""
    widths = []
    band_starts = banded.band_starts
    monkeypatch.setattr(banded, "band_starts", lambda *given: widths.append(given[2]) or band_starts(*given))
    counts = (150,), (160,)
    full, narrow, border = divergences(counts, attended(counts, lambda j: j * 0 + 150), width=64)
    assert set(widths) == {64}
    assert border.max() <= 1e-5
    torch.testing.assert_close(narrow, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dwa_kd", {}),
        ("dwa_kd", {"alignment": "causal_attention", "band_base": 1.0}),
        ("dwa_kd", {"alignment": "bytes", "variant": "authors"}),
        ("dwa_kd", {"band": False, "dtw_embedding": False}),
        ("dwa_kd_v2", {"band_base": 1.0}),
        ("dskd", {}),
    ],
)
def test_long_responses_give_the_loss_of_short_ones(name, options, monkeypatch):
    """Terms and gradients of whole methods do not change if responses count as long and a narrow band is widened."""
    torch.manual_seed(0)
    examples, heads = random_examples([(21, 27), (9, 4), (1, 2)]), random_heads()
    loss = build_loss(name, options, widths=WIDTHS, pair=pair_of(heads)).double()
    hidden = [
        example[f"{own}_{part}"].requires_grad_()
        for example in examples
        for own, part in (("student", "hidden"), ("student", "out"))
    ]
    narrow = {} if name == "dskd" else {"dtw_width": 8, "dtw_max_border": 1e-14}
    results = []
    for is_long in (False, True):
        if is_long:
            monkeypatch.setattr(sides, "LONG", 4)
            monkeypatch.setattr(attention, "_CELLS", 50)
            loss.options = loss.options.model_copy(update=narrow)
        output = loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1]))
        leaves = [*hidden, *(own for own in loss.parameters() if own.requires_grad)]
        results.append((output.terms, torch.autograd.grad(output.loss, leaves, allow_unused=True)))
    if narrow:
        assert results[0][0].pop("dtw_border") == 0
        assert results[1][0].pop("dtw_border") <= 1e-14
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


class LargestTensor(TorchDispatchMode):
    """Record the number of values of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(one.numel() for one in tree_leaves(found) if isinstance(one, torch.Tensor))])
        return found


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_blocks_has_no_large_matrix(causal, monkeypatch):
    """A matrix of all tokens would need gigabytes for long responses. Values and gradients are those of the whole matrices."""
    torch.manual_seed(0)
    heads, examples = random_heads(), random_examples([(90, 110), (20, 10)])
    own, other = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    maps = attention.Projectors(WIDTHS, with_embedding=False, query_parts=1 if causal else 2).double()
    results, largest = [], []
    for limit in (200, 4):
        monkeypatch.setattr(sides, "LONG", limit)
        monkeypatch.setattr(attention, "_CELLS", 2000)
        with LargestTensor() as mode:
            found = attention.cross_model_attention(own, other, maps, TeacherScale.of(other), causal=causal)
            total = found.t2s_hidden.square().sum() + found.s2t_hidden.square().sum()
            grads = torch.autograd.grad(
                total, [*maps.query.parameters(), *maps.t2s.parameters(), *maps.s2t.parameters()]
            )
        focus = [values[n, :count] for values in found.focus for n, count in enumerate((90, 20))]
        results.append((found.t2s_hidden, found.s2t_hidden, focus, grads))
        largest.append(mode.numel)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert largest[0] >= 2 * 90 * 110
    assert largest[1] <= 4000, "two blocks, in forward and backward pass"


def test_attention_in_blocks_under_autocast(monkeypatch):
    """Mixed precision gives the products of the learned maps another dtype than the keys."""
    heads, examples = random_heads(), random_examples([(30, 40), (20, 10)])
    own, other = (side(examples, name, head) for name, head in zip(("student", "teacher"), heads, strict=True))
    maps = attention.Projectors(WIDTHS, with_embedding=False).float()
    results = []
    for limit in (200, 4):
        monkeypatch.setattr(sides, "LONG", limit)
        with torch.autocast("cpu", torch.bfloat16):
            found = attention.cross_model_attention(own, other, maps, TeacherScale.of(other))
        total = found.t2s_hidden.float().square().sum() + found.s2t_hidden.float().square().sum()
        grads = torch.autograd.grad(total, [maps.query.weight, maps.t2s.weight, maps.s2t.weight])
        results.append((found.t2s_hidden.float(), found.s2t_hidden.float(), *grads))
    for whole, blocks in zip(*results, strict=True):
        assert (whole - blocks).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("limit", [4000, 4])
def test_attention_of_maps_in_bfloat16_finds_the_same_tokens(limit, monkeypatch):
    """FSDP and DeepSpeed give maps in bfloat16. If positions were rounded too, the band would be tokens away from the text."""
    monkeypatch.setattr(sides, "LONG", limit)
    examples = [
        {key: value.bfloat16().float() if value.is_floating_point() else value for key, value in each.items()}
        for each in random_examples([(900, 1000)])
    ]
    own, other = (
        side(examples, name, head.float()) for name, head in zip(("student", "teacher"), random_heads(), strict=True)
    )
    maps = attention.Projectors(WIDTHS, with_embedding=False)
    maps.query.weight.data = torch.eye(*maps.query.weight.shape)  # whose products bfloat16 holds exactly
    maps.query.bias.data.zero_()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found.append(attention.cross_model_attention(own, other, maps.to(dtype), TeacherScale.of(other)))
    for exact, rounded in zip(*(each.focus for each in found), strict=True):
        torch.testing.assert_close(rounded.float(), exact, rtol=1e-4, atol=1e-2)
    assert (found[1].t2s_hidden - found[0].t2s_hidden).norm() < 0.02 * found[0].t2s_hidden.norm()


def test_auto_computes_a_band_for_long_responses_only(monkeypatch):
    """dtw_width=auto reports the mass on the border once a response exceeds the limit, and full never computes a band."""
    examples, heads = random_examples([(12, 14)]), random_heads()
    called = []
    monkeypatch.setattr(
        "dwakd.losses.alignment.banded_divergences",
        lambda *given, **settings: called.append(settings["width"]) or banded_divergences(*given, **settings),
    )
    batch = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    for limit, width, expected in ((14, "auto", []), (13, "auto", [512]), (13, "full", []), (14, 9, [9])):
        monkeypatch.setattr(sides, "LONG", limit)
        called.clear()
        build_loss("dwa_kd", {"dtw_width": width}, widths=WIDTHS).double()(*batch)
        assert called == expected
