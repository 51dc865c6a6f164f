"""Test that a sum of methods has the value, the gradients, the terms and the needs of its parts."""

import copy
import dataclasses

import pytest
import torch

from dwakd.errors import UserError
from dwakd.losses import SeveralTeachers, WeightedSumLoss, build_loss, method_options
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side

LENGTHS = [(5, 7), (9, 4), (1, 2)]
SUMS = [
    [{"method": "dwa_kd", "variant": "recommended", "weight": 2.0}, {"method": "alm", "weight": 0.5}],
    [{"method": "dskd_v2"}, {"method": "gold", "kd_weight": 0.3}],
    [{"method": "min_ed", "weight": 0.1}, {"method": "sra"}, {"method": "uld", "variant": "dskd", "weight": 3.0}],
    [{"method": "sft", "weight": 0.7}, {"method": "dskd"}],
    [{"method": "alm"}],
]


def build(losses, seed=0):
    torch.manual_seed(seed)
    return build_loss("sum", {"losses": losses}, widths=WIDTHS, pair=pair_of(random_heads())).double()


def sides(seed=0, *, sampled=False):
    examples, heads = random_examples(LENGTHS, seed=seed), random_heads()
    student, teacher = side(examples, "student", heads[0].requires_grad_()), side(examples, "teacher", heads[1])
    return dataclasses.replace(student, hidden=student.hidden.requires_grad_(), sampled=sampled), teacher


def gradients(value, loss, student):
    learned = [student.hidden, student.head.weight, *loss.parameters()]
    return torch.autograd.grad(value, learned, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("losses", SUMS, ids=lambda losses: "+".join(part["method"] for part in losses))
def test_a_sum_is_its_parts_with_one_cross_entropy(losses, sampled):
    """A sum is the weighted sum of its parts with the cross-entropy of the first; sampled responses have none."""
    loss = build(losses)
    student, teacher = sides(sampled=sampled)
    output = loss(student, teacher)
    expected, terms = 0.0, {}
    ce = torch.nn.functional.cross_entropy(student.hidden @ student.head.weight.T, student.target_ids)
    for number, part in enumerate(losses):
        own = loss.parts[part["method"]]
        found = own(student, teacher)
        again = 0.0 if number == 0 or sampled else own.options.cross_entropy_weight
        expected = expected + part.get("weight", 1.0) * (found.loss - again * ce)
        terms |= {
            f"{part['method']}.{name}": value for name, value in found.terms.items() if name not in ("ce", "loss")
        }
    torch.testing.assert_close(output.loss, expected, atol=1e-12, rtol=1e-12)
    for got, wanted in zip(gradients(output.loss, loss, student), gradients(expected, loss, student), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(
        output.terms, {"ce": ce.detach() * (not sampled), **terms, "loss": output.loss.detach()}, atol=1e-12, rtol=1e-12
    )
    assert output.terms.keys() - {"loss"} <= set(loss.terms)


def test_needs_are_those_of_the_parts():
    """A sum needs what any of its parts needs."""
    needs = ("needs_teacher", "needs_models", "needs_attention", "needs_edit_alignment", "needs_same_vocabulary")
    for losses, expected in (
        ([{"method": "sft"}], (False, None, False, False, False)),
        ([{"method": "alm"}, {"method": "dwa_kd"}], (True, "widths", False, False, False)),
        ([{"method": "dwa_kd"}, {"method": "gold"}, {"method": "alm"}], (True, "pair", False, False, False)),
        ([{"method": "sra"}, {"method": "min_ed"}], (True, "pair", True, True, False)),
        ([{"method": "alm"}, {"method": "kd"}], (True, None, False, False, True)),
    ):
        options = method_options("sum", {"losses": losses})
        assert tuple(getattr(options, name) for name in needs) == expected
    for names, expected in (
        (["sft"], False),
        (["sft", "alm"], True),
        (["alm", "dwa_kd"], method_options("dwa_kd").supports_sampled),
    ):
        options = method_options("sum", {"losses": [{"method": name} for name in names]})
        assert options.supports_sampled == expected


def test_schedules_and_projections_are_those_of_the_parts():
    """A sum sets the step of its parts, and has the projection of the first part that has one."""
    loss = build([{"method": "alm"}, {"method": "dwa_kd", "gamma_end": 0.5, "gamma_steps": 4}])
    loss.set_step(4)
    assert loss.parts["dwa_kd"].gamma == 0.5
    student, teacher = sides()
    twice = SeveralTeachers([loss, copy.deepcopy(loss)], [3, 1])(student, [teacher, teacher])
    once = loss(student, teacher)
    torch.testing.assert_close(twice.loss, once.loss, rtol=1e-10, atol=1e-12)
    assert [twice.terms[f"gate_{k}"].item() for k in (1, 2)] == pytest.approx([0.75, 0.25])
    without = build([{"method": "alm"}, {"method": "uld"}])
    assert "gate_1" not in SeveralTeachers([without, without])(student, [teacher, teacher]).terms


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "at least one method"),
        ([{"method": "alm"}, {"method": "uld"}, {"method": "alm"}], "alm is given twice"),
        ([{"method": "sum", "losses": []}], r"^losses\.1\.method must be one of .* got 'sum'"),
        ([{"method": "alm"}, {"temperature": 1.0}], r"^losses\.2\.method is missing"),
        ([{"method": "alm"}, {"method": "uld", "tau": 1.0}], r"unknown option losses\.2\.tau of method uld"),
        ([{"method": "alm", "weight": 0}], r"^losses\.1\.weight must be at least"),
        ([{"method": "alm"}, {"method": "gold", "ce_weight": 1.0}], "ce_weight of gold in part 2 has no effect"),
        ([{"method": "alm"}, {"method": "sft"}], "sft in part 2 has no effect"),
    ],
)
def test_mistakes_in_parts_are_named(losses, message):
    """Invalid parts, and parts or options without an effect, are refused in one sentence."""
    with pytest.raises(UserError, match=message):
        WeightedSumLoss(losses=losses)
