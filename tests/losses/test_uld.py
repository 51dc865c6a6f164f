"""Test ULD: the formula, its invariances, and the hand-written gradient."""

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss import Chunk, HeadRows, head_loss
from dwakd.losses import UldLoss
from dwakd.losses.uld import SortedDifference, UldOptions
from tests.losses.builders import random_examples, random_heads, side


def literal(examples, heads, *, temperature=1.0):
    """Return for each example the number of pairs, the number of student tokens and the sum over its pairs, by loops."""
    results = []
    for example in examples:
        p, q = (
            (example[f"{name}_hidden"] @ head.T / temperature).softmax(-1).sort(-1, descending=True).values
            for name, head in zip(("student", "teacher"), heads, strict=True)
        )
        pairs = min(len(p), len(q))
        total = torch.zeros((), dtype=p.dtype)
        for k in range(pairs):
            for i in range(max(p.shape[1], q.shape[1])):
                a = p[k, i] if i < p.shape[1] else torch.zeros((), dtype=p.dtype)
                b = q[k, i] if i < q.shape[1] else torch.zeros((), dtype=p.dtype)
                total = total + (a - b).abs()
        results.append((pairs, len(p), total))
    return results


def run(loss, examples, heads):
    return loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1]))


@pytest.mark.parametrize("lengths", [[(3, 3)], [(3, 5)], [(5, 2)], [(4, 6), (3, 1), (1, 1)]])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_readings_are_the_formula(lengths, temperature):
    """The loss equals the formula of the paper and, with `variant="dskd"`, that of the published code."""
    examples, heads = random_examples(lengths), random_heads()
    parts = literal(examples, heads, temperature=temperature)
    tokens = sum(rows for _, rows, _ in parts)
    paper = run(UldLoss(temperature=temperature), examples, heads)
    expected = sum(rows / pairs * total for pairs, rows, total in parts) / tokens
    torch.testing.assert_close(paper.terms["uld"], expected)
    torch.testing.assert_close(paper.loss, paper.terms["ce"] + 1.5 * expected)
    port = run(UldLoss(temperature=temperature, variant="dskd"), examples, heads)
    torch.testing.assert_close(port.terms["uld"], sum(total for *_, total in parts) / tokens)
    torch.testing.assert_close(port.loss, (port.terms["ce"] + port.terms["uld"]) / 2)


def test_one_example_is_the_papers_mean():
    """For one example, the term is the mean over the pairs, also for responses of different lengths."""
    examples, heads = random_examples([(6, 4)]), random_heads()
    ((pairs, _, total),) = literal(examples, heads)
    torch.testing.assert_close(run(UldLoss(), examples, heads).terms["uld"], total / pairs)


def test_the_same_model_gives_zero():
    """The distance of a model to itself is 0 with zero gradient."""
    examples, heads = random_examples([(5, 5), (3, 3)]), random_heads()
    student = side(examples, "student", heads[0])
    assert UldLoss()(student, student).terms["uld"].item() < 1e-12
    logits = [torch.randn(6, 50) for _ in range(2)]
    logits[1].copy_(logits[0])
    criterion = SortedDifference(UldOptions(ce_weight=0.0, temperature=2.0), torch.zeros(6).long(), torch.ones(6), 0.0)
    terms = criterion.differentiate(logits, Chunk((slice(0, 6),) * 2), {}, None, (True, False))
    assert terms["uld"].abs().max() < 1e-6
    assert logits[0].abs().max() < 1e-6


def test_names_of_tokens_and_impossible_tokens_change_nothing():
    """The term does not depend on the order of the vocabulary, nor on head entries with probability 0."""
    examples, heads = random_examples([(4, 5), (3, 3)]), random_heads()
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    expected = UldLoss()(student, teacher).terms["uld"]
    shuffled = side(examples, "teacher", heads[1][torch.randperm(13)])
    torch.testing.assert_close(UldLoss()(student, shuffled).terms["uld"], expected)
    padded = OutputHead(
        torch.cat([heads[1], torch.zeros(40, 8).double()]),
        torch.cat([torch.zeros(13), torch.full((40,), -torch.inf)]).double(),
    )
    wide = side(examples, "teacher", heads[1])
    object.__setattr__(wide, "head", padded)
    torch.testing.assert_close(UldLoss()(student, wide).terms["uld"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_add_up(dtype, temperature):
    """Chunks give the terms and gradients of plain torch on all tokens at once."""
    results = []
    for impl in ("naive", "chunked"):
        generator = torch.Generator().manual_seed(1)
        hidden, weight, teacher, teacher_weight = (
            torch.randn(shape, generator=generator, dtype=dtype) for shape in ((40, 6), (90, 6), (40, 8), (70, 8))
        )
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
        lengths = torch.tensor([40])
        options = UldOptions(ce_weight=0.5, temperature=temperature)
        criterion = SortedDifference(options, torch.arange(40), torch.linspace(0, 2, 40), 0.5)
        rows = [HeadRows(hidden, OutputHead(weight), lengths), HeadRows(teacher, OutputHead(teacher_weight), lengths)]
        output = head_loss(rows, criterion, impl=impl, budget=12_000)
        results.append((output.loss.detach(), *output.terms.values(), *torch.autograd.grad(output.loss, leaves)))
    tolerance = {"atol": 1e-12, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 2e-4}
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("variant", ["paper", "dskd"])
def test_the_callers_tensors_stay_as_they_are(variant):
    """The loss does not change the caller's tensors, unlike the published code."""
    examples, heads = random_examples([(4, 6), (3, 2)]), random_heads()
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    tensors = [tensor for given in (student, teacher) for tensor in (given.hidden, given.target_ids, given.head.weight)]
    before = [tensor.clone() for tensor in tensors]
    UldLoss(variant=variant)(student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
