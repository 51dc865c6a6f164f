"""Test KD between models with one tokenizer against the specification's table and in special cases."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dwakd.batch import ModelSide, OutputHead
from dwakd.kernels.head_loss import head_loss
from dwakd.losses import KdLoss
from dwakd.losses.divergences import DIVERGENCES
from tests.losses.builders import random_examples, random_heads, side, use_kernels
from tests.losses.test_divergences import STUDENT, TABLE, TEACHER


def rows_of(logits: torch.Tensor, head: torch.Tensor | None = None) -> ModelSide:
    """Return a side with these logits, whose head is the identity by default."""
    rows, vocab = logits.shape
    return ModelSide(
        hidden=logits,
        input_embeddings=logits,
        target_embeddings=logits,
        target_ids=torch.zeros(rows, dtype=torch.long),
        lengths=torch.tensor([rows]),
        byte_ends=torch.arange(1, rows + 1),
        head=OutputHead(torch.eye(vocab, dtype=logits.dtype) if head is None else head),
    )


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1, 2])
def test_values_of_the_table(name, temperature):
    """The terms equal the values of the specification for every divergence and two temperatures."""
    loss = KdLoss(divergence=name, temperature=temperature, kd_rate=0.25)
    output = loss(rows_of(STUDENT), rows_of(TEACHER))
    kd, ce = TABLE[name][temperature - 1], -STUDENT.log_softmax(-1)[0, 0].item()
    assert output.terms["kd"].item() == pytest.approx(kd, abs=1e-6)
    assert output.terms["ce"].item() == pytest.approx(ce, abs=1e-12)
    assert output.loss.item() == pytest.approx(0.75 * ce + 0.25 * kd, abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_heads_padded_to_different_widths(name, wider):
    """Head entries that only one model has do not change the divergence. The cross-entropy includes them."""
    logits = {"student": torch.randn(5, 9).double(), "teacher": torch.randn(5, 9).double()}
    loss = KdLoss(divergence=name)
    even = loss(rows_of(logits["student"]), rows_of(logits["teacher"])).terms["kd"]
    logits[wider] = torch.cat([logits[wider], 50 * torch.randn(5, 3).double()], -1)
    uneven = loss(rows_of(logits["student"]), rows_of(logits["teacher"]))
    torch.testing.assert_close(uneven.terms["kd"], even, atol=1e-12, rtol=1e-10)
    ce = -logits["student"].log_softmax(-1)[:, 0].mean()
    torch.testing.assert_close(uneven.terms["ce"], ce, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("widths", [(9, 11), (11, 9)])
def test_the_fast_gradient_is_that_of_the_formula(temperature, widths, monkeypatch):
    """The fast implementation of the default divergence gives the loss and gradients of plain torch."""
    results = []
    for impl in ("naive", "chunked"):
        use_kernels(monkeypatch, head_loss=partial(head_loss, impl=impl, budget=1000))
        generator = torch.Generator().manual_seed(3)
        hidden, weight, teacher, teacher_weight, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((12, 6), (widths[0], 6), (12, 8), (widths[1], 8), (widths[0],))
        )
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
        student, other = rows_of(hidden, weight), rows_of(teacher, teacher_weight)
        student = replace(student, target_ids=torch.arange(12) % 9, head=OutputHead(weight, bias, 0.7, 5.0))
        output = KdLoss(temperature=temperature, kd_rate=0.7)(student, other)
        results.append((output.loss.detach(), *output.terms.values(), *torch.autograd.grad(output.loss, leaves)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-9)


def test_the_same_model_gives_zero():
    """The divergence between a model and itself is 0."""
    examples, heads = random_examples([(5, 5), (3, 3)]), random_heads()
    student = side(examples, "student", heads[0])
    for name in DIVERGENCES:
        terms = KdLoss(divergence=name)(student, student).terms
        assert terms["kd"].item() == pytest.approx(0, abs=1e-12)
        assert terms["ce"] > 0


def test_sides_of_different_rows_are_refused():
    """Sides with different numbers of tokens and a missing teacher raise a ValueError."""
    examples, heads = random_examples([(5, 7)]), random_heads()
    sides = [side(examples, name, head) for name, head in zip(("student", "teacher"), heads, strict=True)]
    with pytest.raises(ValueError, match=r"KdLoss .* 5 tokens .* 7"):
        KdLoss()(*sides)
    with pytest.raises(ValueError, match="KdLoss needs a teacher"):
        KdLoss()(sides[0])
