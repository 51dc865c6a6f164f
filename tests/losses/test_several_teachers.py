"""Test several teachers: mixture weights, and the gate weights of each token."""

import copy
import dataclasses
import math

import pytest
import torch

from dwakd.errors import UserError
from dwakd.kernels.head_loss import only_term
from dwakd.losses import METHODS, SeveralTeachers, TeacherScale, build_loss
from dwakd.losses.attention import cross_model_attention
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side

LENGTHS = [(5, 7), (9, 4), (1, 2)]
PROJECTING = ["dskd", "dskd_v2", "dwa_kd", "dwa_kd_v2"]


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_loss(name, options, widths=WIDTHS, pair=pair_of(random_heads())).double()


def sides(seed=0, same_rows=False):
    lengths = [(rows, rows) for rows, _ in LENGTHS] if same_rows else LENGTHS
    examples, heads = random_examples(lengths, seed=seed), random_heads()
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    return dataclasses.replace(student, hidden=student.hidden.requires_grad_()), teacher


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].options_type.needs_teacher])
def test_the_same_teacher_twice_is_one_teacher(name):
    """Two copies of one teacher give the loss and the gradient of this teacher, for any mixture weights."""
    loss = build(name)
    student, teacher = sides(same_rows=loss.options.needs_same_vocabulary)
    results = []
    for module, given in (
        (loss, teacher),
        (SeveralTeachers([loss, copy.deepcopy(loss)], [3, 1]), [teacher, teacher]),
    ):
        output = module(student, given)
        results.append((output.loss, torch.autograd.grad(output.loss, student.hidden)[0]))
        terms = output.terms
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    gates = [terms[f"gate_{k}"].item() for k in (1, 2)] if name in PROJECTING else [0.75, 0.25]
    assert gates == pytest.approx([0.75, 0.25])
    assert ("gate_1" in terms) == (name in PROJECTING)


def test_weights_alone_give_the_weighted_sum():
    """With gate "weights", the loss is the weighted sum of the losses and there are no terms of the gate."""
    (student, first), (_, second) = sides(0), sides(1)
    losses = [build("dwa_kd", seed) for seed in (0, 1)]
    output = SeveralTeachers(losses, [1, 3], gate="weights")(student, [first, second])
    expected = 0.25 * losses[0](student, first).loss + 0.75 * losses[1](student, second).loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert "gate_1" not in output.terms


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_gate_is_a_softmax_of_projected_confidence(temperature):
    """The gate weights are a softmax over the projected teachers' largest probabilities, with the mixture weights as prior."""
    (student, first), (_, second) = sides(0), sides(1)
    teachers, losses, shares = [first, second], [build("dwa_kd", seed) for seed in (0, 1)], [0.25, 0.75]
    odds = []
    for loss, teacher, share in zip(losses, teachers, shares, strict=True):
        scale = TeacherScale.of(teacher)
        hidden = cross_model_attention(student, teacher, loss.projectors, scale).t2s_hidden
        peak = (hidden @ student.head.weight.T).softmax(-1).amax(-1)
        odds.append(share * (peak / temperature).exp())
    gate_weights = torch.stack(odds) / sum(odds)
    expected = 0.0
    for k, (loss, share) in enumerate(zip(losses, shares, strict=True)):
        without = loss(student, dataclasses.replace(teachers[k], gate_weights=torch.zeros_like(gate_weights[k])))
        gated = loss(student, dataclasses.replace(teachers[k], gate_weights=gate_weights[k]))
        expected += share * without.loss + gated.loss - without.loss
    output = SeveralTeachers(losses, shares, temperature=temperature)(student, teachers)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert output.terms["gate_1"].item() == pytest.approx(gate_weights[0].mean().item(), rel=1e-10)
    assert not torch.allclose(gate_weights[0], gate_weights[0].mean(), atol=1e-3)  # they differ between tokens


@pytest.mark.parametrize("name", PROJECTING)
def test_a_teacher_without_a_token_leaves_its_gate_weight_to_the_others(name):
    """Otherwise a token that only one teacher can explain would be distilled less, by the share of the silent teacher."""
    options = {"alignment": "bytes"} if name in ("dskd", "dwa_kd") else {}
    (student, first), (_, second) = sides(0), sides(1)
    ends = [*range(1, 6), *range(1, 10), 1]
    student = dataclasses.replace(student, byte_ends=torch.tensor(ends))
    # Of the first response, the second teacher lacks one token more than the first
    first = dataclasses.replace(first, byte_ends=torch.tensor([1, 2, 3, *[5] * 4, 1, 2, 3, 9, 0, 1]))
    second = dataclasses.replace(second, byte_ends=torch.tensor([1, 2, *[5] * 5, 1, 2, 8, 9, 0, 1]))
    teachers, losses, shares = [first, second], [build(name, seed, **options) for seed in (0, 1)], [0.25, 0.75]
    projections = [
        loss.projected(student, side, TeacherScale.of(side)) for loss, side in zip(losses, teachers, strict=True)
    ]
    known = torch.stack([projection.kept for projection in projections])
    odds = torch.stack([
        share * (projection.hidden @ student.head.weight.T).softmax(-1).amax(-1).exp() * projection.kept
        for share, projection in zip(shares, projections, strict=True)
    ])  # fmt: skip
    gate_weights = torch.where(known.any(0), odds / odds.sum(0), torch.tensor(shares)[:, None])
    assert {tuple(column) for column in known.T.tolist()} >= {(True, True), (True, False), (False, False)}
    outputs = [
        loss(student, dataclasses.replace(side, gate_weights=gates / share))
        for loss, side, gates, share in zip(losses, teachers, gate_weights, shares, strict=True)
    ]
    output = SeveralTeachers(losses, shares)(student, teachers)
    expected = sum(share * one.terms["kd_student"] for share, one in zip(shares, outputs, strict=True))
    assert output.terms["kd_student"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert output.terms["gate_1"].item() == pytest.approx(gate_weights[0].mean().item(), rel=1e-10)


@pytest.mark.parametrize("name", PROJECTING)
def test_gate_weights_weigh_rows_of_the_student_space_alone(name):
    """Gate weights multiply the student-space divergence of each token and no other term."""
    loss = build(name)
    student, teacher = sides()
    rows = len(student.target_ids)
    once, twice = (
        loss(student, dataclasses.replace(teacher, gate_weights=torch.full((rows,), t).double())) for t in (1, 2)
    )
    plain = loss(student, teacher)
    for term in plain.terms:
        factor = 2 if term == "kd_student" else 1
        assert once.terms[term].item() == pytest.approx(plain.terms[term].item(), rel=1e-12)
        if term != "loss":
            assert twice.terms[term].item() == pytest.approx(factor * plain.terms[term].item(), rel=1e-12)


def test_what_does_not_fit_is_named():
    """Invalid weights and gate options raise a UserError that names the option."""
    losses = [build("dwa_kd"), build("dwa_kd")]
    for options, message in (
        ({"weights": [1.0]}, "teacher_weights .*2 teachers.* got 1"),
        ({"weights": [1.0, 0.0]}, "above 0"),
        ({"weights": [1.0, math.inf]}, "above 0"),
        ({"gate": "best"}, "teacher_gate must be 'confidence' or 'weights', got 'best'"),
        ({"weights": [1.0, math.nan]}, "teacher_weights"),
        ({"weights": [1e30, 5e-324]}, "teacher_weights"),  # the rescaled weight would be 0
        ({"temperature": 0.0}, "teacher_gate_temperature"),
        ({"temperature": 1e-300}, "teacher_gate_temperature"),  # the softmax would overflow
        ({"temperature": math.inf}, "teacher_gate_temperature"),
        ({"temperature": math.nan}, "teacher_gate_temperature"),
    ):
        with pytest.raises(UserError, match=message):
            SeveralTeachers(losses, **options)


@pytest.mark.parametrize("name", ["dwa_kd", "sum"])
def test_the_gate_is_the_same_when_one_term_is_measured(name):
    """The gradient is the sum of the gradients of the terms, so a term that is measured alone has the same gate weights."""
    parts = {"losses": [{"method": "dwa_kd"}, {"method": "alm"}]} if name == "sum" else {}
    (student, first), (_, second) = sides(0), sides(1)
    several = SeveralTeachers([build(name, seed, **parts) for seed in (0, 1)], temperature=0.1)

    def gradient():
        loss = several(student, [first, second]).loss
        return torch.autograd.grad(loss, student.hidden, allow_unused=True, materialize_grads=True)[0]

    measured = []
    for term in several.terms:
        with only_term(term):
            measured.append(gradient())
    torch.testing.assert_close(sum(measured), gradient(), rtol=1e-9, atol=1e-12)
