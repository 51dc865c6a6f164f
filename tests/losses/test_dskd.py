"""Test DSKD against the hand-sized example of its specification."""

import pytest
import torch

from dwakd.losses import DskdLoss, Widths
from tests.losses.builders import WIDTHS, random_examples, random_heads, side
from tests.losses.test_dwa_kd import tiny


@pytest.mark.parametrize(("mask", "total"), [(True, 2.725876), (False, 2.974819)])
def test_values_of_the_specification(mask, total):
    """The terms equal those of the specification with and without the accuracy mask."""
    reference, student, teacher = tiny()
    loss = DskdLoss(widths=Widths(2, 2, 2, 2), accuracy_mask=mask).double()
    loss.projectors.load_state_dict(
        {k: v for k, v in reference.projectors.state_dict().items() if not k.startswith("embedding")}
    )
    terms = {name: 2 * value.item() for name, value in loss(student, teacher).terms.items()}
    assert terms["ce"] == pytest.approx(2.087876, abs=1e-6)
    assert terms["t2s_ce"] == pytest.approx(2.172809, abs=1e-6)
    assert terms["kd_teacher"] == pytest.approx(0.349408 + 0.103338 + 0.100321, abs=2e-6)
    assert terms["kd_student"] == pytest.approx(0.0 if mask else 0.240635 + 0.008308, abs=1e-6)
    assert terms["t2s_ce"] + terms["kd_student"] + terms["kd_teacher"] == pytest.approx(total, abs=1e-6)
    assert terms["loss"] == pytest.approx((2.087876 + total) / 2, abs=1e-6)
    assert torch.isfinite(loss(student, teacher).loss)


def literal(loss, example, heads, temperature=2.0):
    """Compute the three distillation terms of DSKD for models with one tokenizer."""
    maps = loss.projectors
    own = example["student_hidden"] @ heads[0].T
    projected = maps.t2s(example["teacher_hidden"]) @ heads[0].T
    theirs = example["teacher_hidden"] @ heads[1].T
    back = maps.s2t(example["student_hidden"]) @ heads[1].T

    def kl(p, q):
        p, q = (logits.div(temperature).softmax(-1) for logits in (p, q))
        return (p * (p.log() - q.log())).sum(-1)

    target = example["student_target"]
    return {
        "t2s_ce": torch.nn.functional.cross_entropy(projected, target, reduction="sum"),
        "kd_student": kl(projected.detach(), own),
        "kd_teacher": kl(theirs, back).sum(),
        "right": projected.argmax(-1) == target,
    }


@pytest.mark.parametrize("mask", [None, True])
def test_without_attention_states_are_projected_in_place(mask):
    """Without attention, each state is projected at its own position, without the normalisation N(x)."""
    torch.manual_seed(0)
    loss = DskdLoss(widths=WIDTHS, alignment="position", accuracy_mask=mask).double()
    assert {name.split(".")[1] for name, _ in loss.named_parameters()} == {"t2s", "s2t"}
    (example,), heads = random_examples([(40, 40)]), random_heads()
    example["student_hidden"].requires_grad_()
    output = loss(side([example], "student", heads[0]), side([example], "teacher", heads[1]))
    expected = literal(loss, example, heads)
    right = expected.pop("right")
    assert 0 < right.sum() < 40
    kd = expected["kd_student"]
    expected["kd_student"] = (kd * right).sum() if mask else kd.sum()
    for name, value in expected.items():
        torch.testing.assert_close(output.terms[name], value.detach() / 40)
    leaves = [example["student_hidden"], *loss.parameters()]
    ce = torch.nn.functional.cross_entropy(example["student_hidden"] @ heads[0].T, example["student_target"])
    total = ce / 2 + sum(expected.values()) / 80
    torch.testing.assert_close(output.loss, total)
    for got, want in zip(torch.autograd.grad(output.loss, leaves), torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_without_attention_sides_of_different_rows_are_refused():
    """Without attention, sides with different numbers of tokens raise a ValueError."""
    examples, heads = random_examples([(5, 7)]), random_heads()
    loss = DskdLoss(widths=WIDTHS, alignment="position").double()
    with pytest.raises(ValueError, match=r"DskdLoss .* 5 tokens .* 7"):
        loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1]))


def test_without_attention_embeddings_may_have_any_width():
    """Only attention requires that embeddings and hidden states of the teacher have the same width."""
    widths = Widths(6, 8, 6, 5)
    with pytest.raises(ValueError, match="choose another teacher"):
        DskdLoss(widths=widths)
    DskdLoss(widths=widths, alignment="position")
