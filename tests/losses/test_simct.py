"""Test SimCT and SimpleCTKD against plain loops over dense logits."""

import sys
from dataclasses import replace

import pytest
import torch

from dwakd.losses import SimctLoss
from tests.losses.test_min_ed import grouped_sides, logit_side, pair

GROUPS = [([0, 1], [0, 1]), ([2], [2, 3]), ([3], [4])]
SHARED = [(0, 1), (1, 5), (2, 3), (3, 4)]  # cat, s, dog and the end token


@pytest.fixture
def sides():
    return grouped_sides(4, 6, [2, 0, 1, 3], [3, 1, 2, 0, 4])


def literal(student, teacher, *, tau: float, reverse: bool):
    """Compute the divergence of each group by loops; the entries are the shared tokens and, for a unit, its mean logit."""
    values = []
    for group in GROUPS:
        logs = []
        for n, (model, rows) in enumerate(zip((student, teacher), group, strict=True)):
            entries = [model.hidden[rows[0], ids[n]] for ids in SHARED]
            if max(map(len, group)) > 1:
                entries.append(sum(model.hidden[row, model.target_ids[row]] for row in rows) / len(rows))
            scaled = [entry / tau for entry in entries]
            total = sum(entry.exp() for entry in scaled).log()
            logs.append([entry - total for entry in scaled])
        own, theirs = logs
        pairs = zip(own, theirs, strict=True)
        values.append(sum(s.exp() * (s - t) if reverse else t.exp() * (t - s) for s, t in pairs))
    return values


@pytest.mark.parametrize("budget", [1, 2**27])
@pytest.mark.parametrize(("tau", "reverse"), [(1.0, True), (2.0, False)])
def test_loss_and_gradient_are_those_of_the_formula(monkeypatch, sides, tau, reverse, budget):
    """Terms and gradient equal those of the published definition; a unit competes with the tokens at its first position."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    options = {"temperature": tau, "divergence": "reverse_kl" if reverse else "forward_kl", "kd_rate": 0.75}
    first, second, single = literal(*sides, tau=tau, reverse=reverse)
    compare(SimctLoss(pair=pair(), **options), sides, single, first + second, 0.75)


def test_simple_ctkd_compares_only_tokens_that_both_models_write(sides):
    """The predecessor leaves out text that the tokenizers split in different ways."""
    *_, single = literal(*sides, tau=1.0, reverse=False)
    compare(SimctLoss(pair=pair(), variant="simple_ctkd"), sides, single, torch.tensor(0.0), 0.5)


def compare(loss, sides, single, units, rate):
    output, hidden = loss(*sides), sides[0].hidden
    ce = torch.nn.functional.cross_entropy(hidden, sides[0].target_ids)
    for name, value in {"ce": ce, "kd": single / 4, "units": units / 4}.items():
        assert output.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
    total = (1 - rate) * ce + rate * (single + units) / 4
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(value, hidden)[0] for value in (output.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_a_copy_of_the_teacher_has_no_loss():
    """With one tokenizer and equal models, nothing is left to learn."""
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    tokens = (b"cat", b"s", b"dog", None)
    student, teacher = logit_side(logits.clone().requires_grad_(), [2, 0, 1, 3]), logit_side(logits, [2, 0, 1, 3])
    output = SimctLoss(pair=pair(tokens, tokens, (4, 4), (3, 3)))(student, teacher)
    assert output.loss.item() == pytest.approx(0, abs=1e-12)


def test_defaults_of_the_two_methods():
    """The variant replaces the defaults, but not the options that are given."""
    paper, simple = (SimctLoss(pair=pair(), variant=name).options for name in ("paper", "simple_ctkd"))
    assert (paper.kd_rate, paper.divergence, paper.units) == (1.0, "reverse_kl", True)
    assert (simple.kd_rate, simple.divergence, simple.units) == (0.5, "forward_kl", False)
    assert SimctLoss(pair=pair(), variant="simple_ctkd", kd_rate=0.9).options.kd_rate == 0.9


def test_vocabularies_without_a_shared_token_are_refused():
    """There would be nothing to compare, and the softmax over no token is NaN."""
    nothing = replace(pair(), teacher_tokens=tuple(b"zz%d" % index for index in range(6)), end_tokens=None)
    with pytest.raises(ValueError, match="share no token"):
        SimctLoss(pair=nothing)
