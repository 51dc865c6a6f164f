"""Test ALM: values of the specification, the formula, and special cases of the chunks."""

import dataclasses
import math
import sys

import pytest
import torch

from dwakd.losses.alm import AlmLoss, binary_cross_entropy, log1mexp
from tests.losses.builders import random_examples, random_heads, side

ENDS = torch.tensor([2, 3, 5, 9, 9, 4, 6]), torch.tensor([1, 3, 5, 7, 9, 9, 6])
LENGTHS = [(5, 6), (2, 1)]
CHUNKS = [([0, 1], [0, 1]), ([2], [2]), ([3], [3, 4]), ([4], [5]), ([5, 6], [6])]


@pytest.mark.parametrize(
    ("teacher", "student", "value", "floor"),
    [(-1.0, -2.0, 0.058830, 0.055777), (-5.0, -1.0, 0.234353, 0.234353 - 0.039471), (-10.0, -40.0, 0.467532, None)],
)
def test_values_of_the_specification(teacher, student, value, floor):
    """The values equal those of the specification. The lowest possible value is the entropy of the teacher."""
    ell = torch.tensor([teacher]).double(), torch.tensor([student]).double()
    assert binary_cross_entropy(*ell, 100.0, 1e-6).item() == pytest.approx(value, abs=1e-6)
    entropy = binary_cross_entropy(ell[0], ell[0], 100.0, 1e-6).item()
    divergence = {-1.0: 0.003053, -5.0: 0.039471, -10.0: 0.153208}[teacher]
    assert value - entropy == pytest.approx(divergence, abs=2e-6)
    if floor is not None:
        assert entropy == pytest.approx(floor, abs=2e-6)


def test_the_limit_of_a_high_temperature():
    """The temperature times the KL approaches a finite value, so the weight does not depend on the temperature."""
    ell = torch.tensor([-1.0]).double(), torch.tensor([-2.0]).double()
    kl = [binary_cross_entropy(ell[0], other, 1e6, 1e-12) for other in (ell[1], ell[0])]
    assert 1e6 * (kl[0] - kl[1]).item() == pytest.approx(0.306853, abs=1e-4)


def test_the_least_value_is_where_both_models_agree():
    """The gradient is 0 if both models assign the same likelihoods."""
    ell = torch.tensor([-3.0, -0.01, -80.0]).double()
    student = ell.clone().requires_grad_()
    binary_cross_entropy(ell, student, 100.0, 1e-6).sum().backward()
    assert student.grad.abs().max() < 1e-12


def test_log1mexp_is_exact_at_both_ends():
    """log(1 - e^x) and its gradient are accurate near 0 and for very negative x."""
    x = torch.tensor([-1e-6, -0.5, -0.8, -60.0], requires_grad=True)
    expected = [math.log(-math.expm1(v)) if v > -0.6 else math.log1p(-math.exp(v)) for v in x.tolist()]
    torch.testing.assert_close(log1mexp(x), torch.tensor(expected), rtol=1e-5, atol=0.0)
    log1mexp(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def sides(*, same: bool = False):
    examples, heads = random_examples(LENGTHS), random_heads()
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    student = dataclasses.replace(student, byte_ends=ENDS[0])
    return student, student if same else dataclasses.replace(teacher, byte_ends=ENDS[1])


def likelihoods(model) -> torch.Tensor:
    logits = model.head.logits(model.hidden)
    return logits.log_softmax(-1).gather(1, model.target_ids[:, None]).squeeze(1)


def by_hand(student, teacher, weights: str) -> torch.Tensor:
    own, theirs = likelihoods(student), likelihoods(teacher)
    ell = [
        torch.stack([theirs[chunk[1]].sum() for chunk in CHUNKS]),
        torch.stack([own[chunk[0]].sum() for chunk in CHUNKS]),
    ]
    share = [5 / 4] * 4 + [2.0] if weights == "chunk_count" else [float(len(chunk[0])) for chunk in CHUNKS]
    losses = binary_cross_entropy(ell[0], ell[1], 100.0, 1e-6)
    return (losses * torch.tensor(share)).sum() / 7


@pytest.mark.parametrize("budget", [1, 2**27])
@pytest.mark.parametrize("weights", ["chunk_count", "token_count"])
def test_loss_and_gradient_are_those_of_the_formula(monkeypatch, weights, budget):
    """Loss, terms and gradients equal those of the formula for both kinds of chunk weights."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    student, teacher = sides()
    hidden = student.hidden.clone().requires_grad_()
    student = dataclasses.replace(student, hidden=hidden)
    output = AlmLoss(chunk_weights=weights, alm_weight=30.0, ce_weight=0.5)(student, teacher)
    expected = 0.5 * -likelihoods(student).mean() + 30 * by_hand(student, teacher, weights)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert output.terms["alm"].item() == pytest.approx(by_hand(student, teacher, weights).item(), rel=1e-10)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (output.loss, expected)]
    torch.testing.assert_close(*gradients)


def test_one_chunk_has_the_likelihood_of_the_sequence():
    """If an example is one chunk, its term compares the likelihoods of the whole response."""
    student, teacher = sides()
    ends = [torch.tensor([9] * 5 + [6] * 2), torch.tensor([1] * 6 + [6])]
    whole = [dataclasses.replace(model, byte_ends=end) for model, end in zip((student, teacher), ends, strict=True)]
    term = AlmLoss(chunk_temperature=100.0)(*whole).terms["alm"].item()
    own, theirs = likelihoods(student), likelihoods(teacher)
    ell = [torch.stack([log[:cut].sum(), log[cut:].sum()]) for log, cut in ((theirs, 6), (own, 5))]
    expected = (binary_cross_entropy(*ell, 100.0, 1e-6) * torch.tensor([5.0, 2.0])).sum() / 7
    assert term == pytest.approx(expected.item(), rel=1e-10)


def test_one_model_matches_itself_token_by_token():
    """For a model and itself, each token is a chunk and the gradient is 0."""
    student, teacher = sides(same=True)
    hidden = student.hidden.clone().requires_grad_()
    AlmLoss(ce_weight=0.0)(dataclasses.replace(student, hidden=hidden), teacher).loss.backward()
    assert hidden.grad.abs().max() < 1e-12


def test_unknown_weights_are_named():
    """An unknown value of `chunk_weights` raises a ValueError instead of using the default."""
    with pytest.raises(ValueError, match="'chunk_count' or 'token_count'"):
        AlmLoss(chunk_weights="mean")
