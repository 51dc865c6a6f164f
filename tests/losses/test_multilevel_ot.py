"""Test MultiLevelOT: values of the specification, symmetries, the published code, and the hand-written gradient."""

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.kernels import sinkhorn
from dwakd.kernels.head_loss import HeadRows, head_loss
from dwakd.losses import MultiLevelOtLoss, UldLoss
from dwakd.losses.multilevel_ot import MultiLevelOtOptions, RankedLevels
from tests.losses.builders import random_examples, random_heads, side
from tests.losses.test_kd import rows_of

TEACHER = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.6, 0.1]], dtype=torch.float64).log()
OT = ("absolute", "logarithmic", "sinkhorn")


def sums(loss, student, teacher, rows=2):
    return {name: rows * value.item() for name, value in loss(student, teacher).terms.items()}


def test_values_of_the_specification():
    """The terms equal those of the specification. Tokens are sorted once for the sequence, by each model on its own."""
    loss = MultiLevelOtLoss(top_k=2, sequence_temperature=1.0)
    terms = sums(loss, rows_of(STUDENT), rows_of(TEACHER))
    assert terms["absolute"] == pytest.approx(0.45, abs=1e-9)
    assert terms["logarithmic"] == pytest.approx(1.803119, abs=1e-6)
    assert terms["sinkhorn"] == pytest.approx(0.453217, abs=1e-6)
    assert terms["loss"] - terms["ce"] == pytest.approx(0.101345, abs=1e-6)
    assert sums(UldLoss(), rows_of(STUDENT), rows_of(TEACHER))["uld"] == pytest.approx(0.5, abs=1e-9)


def test_the_temperature_of_the_sequence_level_is_its_own():
    """The Sinkhorn costs use `sequence_temperature`, the other terms `temperature`."""
    terms = sums(MultiLevelOtLoss(top_k=2), rows_of(STUDENT), rows_of(TEACHER))
    t, s = ((side / 2).softmax(-1) for side in (TEACHER, STUDENT))
    cost = torch.cdist(t[:, [1, 0]], s[:, [2, 0]], p=1)
    assert terms["sinkhorn"] == pytest.approx(2 * sinkhorn(cost[None], 0.1, 20).item(), abs=1e-9)
    assert terms["absolute"] == pytest.approx(0.45, abs=1e-9)


def test_names_of_tokens_change_nothing_unless_they_change_between_positions():
    """Renaming tokens changes nothing if it is the same at all positions.

    Unlike ULD, the loss depends on renaming at one position.
    """
    loss, student = MultiLevelOtLoss(top_k=2), rows_of(STUDENT)
    expected = sums(loss, student, rows_of(TEACHER))
    assert sums(loss, student, rows_of(TEACHER[:, [2, 0, 1]])) == pytest.approx(expected, abs=1e-9)
    moved = torch.stack([TEACHER[0], TEACHER[1, [1, 2, 0]]])
    assert sums(loss, student, rows_of(moved))["absolute"] != pytest.approx(expected["absolute"], abs=1e-3)
    uld = [sums(UldLoss(), student, rows_of(teacher))["uld"] for teacher in (TEACHER, moved)]
    assert uld[0] == pytest.approx(uld[1], abs=1e-9)


def test_positions_permuted_together_leave_the_sequence_level():
    """Permuting the positions of both models changes no term.

    Permuting those of one model changes all but the transport cost.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, width, generator=generator).double() for width in (9, 11))
    order, other = (torch.randperm(6, generator=generator) for _ in range(2))
    loss = MultiLevelOtLoss(top_k=5)
    expected = sums(loss, rows_of(student), rows_of(teacher))
    both = sums(loss, rows_of(student[order]), rows_of(teacher[order]))
    assert [both[name] for name in OT] == pytest.approx([expected[name] for name in OT], abs=1e-9)
    one = sums(loss, rows_of(student[other]), rows_of(teacher))
    # 20 iterations do not converge fully, so the order of the rows still affects the last digits
    assert one["sinkhorn"] == pytest.approx(expected["sinkhorn"], abs=1e-6)
    assert one["absolute"] != pytest.approx(expected["absolute"], abs=1e-3)


def test_the_same_model_gives_zero_distances():
    """For a model and itself, the `absolute` and the `sinkhorn` term are 0."""
    distinct = 30 * torch.eye(5, 9).double()
    terms = sums(MultiLevelOtLoss(sequence_temperature=1.0), rows_of(distinct), rows_of(distinct), rows=5)
    assert terms["absolute"] == pytest.approx(0, abs=1e-9)
    assert terms["sinkhorn"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lengths", [[(3, 5)], [(5, 2)], [(4, 6), (3, 1), (1, 1), (2, 2)]])
def test_responses_of_unequal_lengths(lengths):
    """For unequal lengths, positions are paired up to the shorter length, and the transport is between all positions."""
    examples, heads = random_examples(lengths), random_heads()
    terms = MultiLevelOtLoss(top_k=4)(side(examples, "student", heads[0]), side(examples, "teacher", heads[1])).terms
    expected = dict.fromkeys(OT, 0.0)
    for example in examples:
        top, soft = [], []
        for name, head in zip(("student", "teacher"), heads, strict=True):
            logits = example[f"{name}_hidden"] @ head.T
            order = logits.softmax(-1).sum(0).argsort(descending=True)[:4]
            top.append(logits.softmax(-1)[:, order])
            soft.append((logits / 2).softmax(-1)[:, order])
        n = min(len(top[0]), len(top[1]))
        for k in range(n):
            expected["absolute"] += (top[1][k] - top[0][k]).abs().sum()
            expected["logarithmic"] -= (top[1][k] * top[0][k].log()).sum()
        cost = torch.cdist(soft[1], soft[0], p=1)
        expected["sinkhorn"] += n * sinkhorn(cost[None], 0.1, 20, impl="naive")[0]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value / sum(s for s, _ in lengths))


def test_the_port_divides_by_deviations_and_softens_twice():
    """`variant="mcw_kd"` computes the loss of the published port, which normalises logits and softens them twice."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, width, generator=generator).double() for width in (9, 11))
    scaled = [z / (z.std(-1, keepdim=True) + 1e-4) / 2 for z in (student, teacher)]
    s, t = (p[:, p.sum(0).argsort(descending=True)[:3]] for p in (z.softmax(-1) for z in scaled))
    cost = torch.cdist((t / 2).softmax(-1), (s / 2).softmax(-1), p=1)
    distance = 4 * sinkhorn(cost[None], 0.1, 10).item()
    logarithmic = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean().item()
    scalar = (0.1 * 0.001 * distance) + 0.1 * logarithmic + (s - t).abs().sum(-1).mean().item()
    terms = sums(MultiLevelOtLoss(top_k=3, variant="mcw_kd"), rows_of(student), rows_of(teacher), rows=4)
    assert terms["loss"] - terms["ce"] == pytest.approx(4 * scalar, abs=1e-9)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0, 2.0), (0.7, 1.5), (1.0, 1.0)])
def test_chunks_of_several_examples_add_up(temperatures):
    """Chunks of a few examples give the terms and gradients of plain torch."""
    results = []
    for impl in ("naive", "chunked"):
        generator = torch.Generator().manual_seed(1)
        hidden, weight, bias, teacher, teacher_weight = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((12, 6), (90, 6), (90,), (13, 8), (70, 8))
        )
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
        lengths = torch.tensor([4, 3, 5]), torch.tensor([5, 6, 2])
        options = MultiLevelOtOptions(top_k=5, temperature=temperatures[0], sequence_temperature=temperatures[1])
        rows = [
            HeadRows(hidden, OutputHead(weight, bias), lengths[0]),
            HeadRows(teacher, OutputHead(teacher_weight), lengths[1]),
        ]
        criterion = RankedLevels(options, torch.arange(12), lengths, options.ce_weight)
        output = head_loss(rows, criterion, impl=impl, budget=12_000)
        results.append((output.loss.detach(), *output.terms.values(), *torch.autograd.grad(output.loss, leaves)))
    for index, (expected, got) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(got.sum() if 1 <= index <= 4 else got, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("variant", ["paper", "mcw_kd"])
def test_the_callers_tensors_stay_as_they_are(variant):
    """The loss does not change the caller's tensors, unlike the published port."""
    examples, heads = random_examples([(4, 6), (3, 2)]), random_heads()
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    tensors = [t for given in sides for t in (given.hidden, given.target_ids, given.head.weight)]
    before = [tensor.clone() for tensor in tensors]
    MultiLevelOtLoss(variant=variant)(*sides)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
