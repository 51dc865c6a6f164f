"""Test GOLD: merged groups, shared and unmatched tokens, and special cases with one tokenizer."""

import math
import sys
from functools import partial

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss import head_loss
from dwakd.losses import GoldLoss, ModelPair, Widths
from dwakd.losses.divergences import sorted_difference
from dwakd.losses.gold import Anchors, generalised_jsd
from tests.losses.builders import pair_of, random_examples, random_heads, side, smallest_pair
from tests.losses.test_min_ed import grouped_sides, logit_side, pair

GROUPS = [([0, 1], [0, 1]), ([2], [2, 3]), ([3], [4])]


@pytest.fixture
def sides():
    return grouped_sides(4, 6, [2, 0, 1, 3], [3, 1, 2, 0, 4])


@pytest.mark.parametrize(
    ("last", "probs", "targets", "expected"),
    [
        (False, [[0.6, 0.3, 0.1], [0.05, 0.9, 0.05]], [0, 1], [0.54, 0.27, 0.09]),
        (True, [[0.6, 0.3, 0.1], [0.05, 0.9, 0.05]], [0, 1], [0.03, 0.54, 0.03]),
    ],
)
def test_merged_distributions_of_the_specification(last, probs, targets, expected):
    """The merged distribution is that of the first or last token times the other tokens' probabilities."""
    rows = logit_side(torch.tensor(probs).log(), targets)
    anchors = Anchors(rows.target_ids, torch.tensor([0, 0]), torch.tensor([not last, last]))
    torch.testing.assert_close(anchors.merged(rows.hidden.t(), slice(0, 2), 1.0).t().exp(), torch.tensor([expected]))


def by_hand(student, teacher, *, merge: str, beta: float, temperature: float = 1.0):
    """Compute the JSD and the unmatched difference of each group from plain probabilities."""
    merged = []
    for n, model in enumerate((student, teacher)):
        probs = (model.hidden / temperature).softmax(-1)
        rows = []
        for group in GROUPS:
            *before, anchor = group[n] if merge == "bayesian" else reversed(group[n])
            factor = math.prod([probs[row, model.target_ids[row]] for row in before], start=torch.ones(()).double())
            rows.append(probs[anchor] * factor)
        merged.append(torch.stack(rows))
    # shared ids (student, teacher): cat 0, 1; s 1, 5; dog 2, 3; end 3, 4. The teacher's cats 0 and x 2 are unmatched
    s, t = merged[0], merged[1][:, [1, 5, 3, 4]]
    m = beta * t + (1 - beta) * s
    jsd = (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)
    return jsd, merged[1][:, [0, 2]].sum(-1)


@pytest.mark.parametrize("budget", [1, 2**27])
@pytest.mark.parametrize(("merge", "beta", "temperature"), [("bayesian", 0.5, 1.0), ("observed", 0.3, 2.0)])
def test_loss_and_gradient_are_those_of_the_formula(monkeypatch, sides, merge, beta, temperature, budget):
    """Terms and gradients equal those of the formula, for several chunk sizes."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    student, teacher = sides
    options = {"merge": merge, "beta": beta, "temperature": temperature, "ce_weight": 0.25, "kd_weight": 2.0}
    output = GoldLoss(pair=pair(), **options)(student, teacher)
    jsd, uld = by_hand(student, teacher, merge=merge, beta=beta, temperature=temperature)
    ce = torch.nn.functional.cross_entropy(student.hidden, student.target_ids)
    expected = {"ce": ce, "jsd": jsd.mean(), "uld": uld.mean()}  # 3 groups of weight 4/3, divided by 4 tokens
    for name, value in expected.items():
        assert output.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
    total = 0.25 * ce + 2 * (4 / 6 * jsd.mean() + 2 / 6 * uld.mean())
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, student.hidden)[0] for loss in (output.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_unmatched_columns_of_both_sides_are_compared_by_rank():
    """Sorted probabilities are compared rank by rank. Those that only the longer row has are added."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert sorted_difference(p, q).item() == pytest.approx(0.4, abs=1e-6)
    assert sorted_difference(q, p).item() == pytest.approx(0.4, abs=1e-6)
    assert sorted_difference(p, q[:, :0]).item() == pytest.approx(1.0, abs=1e-6)
    assert sorted_difference(p, p.flip(1)).item() == 0


def test_the_gradient_goes_through_the_ranks():
    """Without shared tokens, the loss and its gradient are those of ULD on the merged groups."""
    generator = torch.Generator().manual_seed(3)
    own, theirs = (torch.randn(3, width, generator=generator).double() for width in (5, 4))
    student, teacher = logit_side(own.requires_grad_(), [2, 0, 1]), logit_side(theirs, [3, 1, 2])
    vocabularies = (b"a", b"b", b"c", b"d", b"e"), (b"f", b"g", b"h", b"i")
    output = GoldLoss(pair=pair(*vocabularies, (5, 4), None))(student, teacher)
    sorts = [model.hidden.softmax(-1).sort(-1, descending=True).values for model in (student, teacher)]
    expected = (sorts[0] - torch.nn.functional.pad(sorts[1], (0, 1))).abs().sum(-1).mean()
    assert output.terms["jsd"] == 0
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, own)[0] for loss in (output.loss, expected)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_one_tokenizer_is_generalised_jsd(beta):
    """With one tokenizer, the loss is the JSD of each token over the whole head, and the `uld` term is 0."""
    generator = torch.Generator().manual_seed(1)
    own, theirs = (torch.randn(4, 6, generator=generator).double() for _ in range(2))
    tokens = (b"a", None, b"b", b"c", b"ab")
    student, teacher = logit_side(own.requires_grad_(), [0, 1, 2, 3]), logit_side(theirs, [0, 1, 2, 3])
    output = GoldLoss(pair=pair(tokens, tokens, (6, 6), (1, 1)), beta=beta)(student, teacher)
    p, q = theirs.softmax(-1), own.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()) + (1 - beta) * (q * (q / m).log())
    if beta in (0, 1):
        expected = q * (q / p).log() if beta else p * (p / q).log()
    assert output.terms["uld"] == 0
    torch.testing.assert_close(output.loss, expected.sum(-1).mean())
    torch.testing.assert_close(*(torch.autograd.grad(x, own)[0] for x in (output.loss, expected.sum(-1).mean())))


def test_jsd_of_unnormalised_distributions_is_not_negative():
    """The JSD is at least 0 for merged distributions that do not sum to 1."""
    p = torch.tensor([[0.3, 0.2, 0.0]]).log()
    for scale in (0.01, 0.5, 1.0, 3.0):
        assert generalised_jsd(p, p + math.log(scale), 0.5).item() >= 0
    assert generalised_jsd(p, p, 0.5).item() == pytest.approx(0.0, abs=1e-7)


def test_weights_are_adaptive_or_given(sides):
    """The weights are by default the fractions of shared and unmatched tokens. Setting only one of them is an error."""
    assert GoldLoss(pair=pair()).matched_weight == pytest.approx(4 / 6)
    loss = GoldLoss(pair=pair(), matched_weight=2.0, unmatched_weight=0.0)
    terms = loss(*sides).terms
    assert terms["loss"].item() == pytest.approx(2 * terms["jsd"].item())
    with pytest.raises(ValueError, match=r"matched_weight and unmatched_weight"):
        GoldLoss(pair=pair(), matched_weight=2.0)
    with pytest.raises(ValueError, match="'bayesian' or 'observed'"):
        GoldLoss(pair=pair(), merge="mean")


def test_the_smallest_pair_checks_options():
    """Options are validated with a vocabulary of one token, before any model is loaded."""
    GoldLoss(pair=smallest_pair())
    head = OutputHead(torch.eye(2))
    GoldLoss(pair=ModelPair(Widths(2, 2, 2, 2), (b"a", b"b"), (b"c",), head, head))


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
@pytest.mark.parametrize("budget", [1, 600, 2**27])
def test_chunks_of_several_examples_add_up(monkeypatch, merge, budget):
    """Chunks of the batch give the terms and the gradient of plain torch, although groups are numbered within a chunk."""
    examples, heads = random_examples([(5, 7), (9, 4), (1, 2), (6, 6)]), random_heads()
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    hidden = student.hidden.requires_grad_()
    results = []
    for impl in ("chunked", "naive"):
        monkeypatch.setattr(sys.modules["dwakd.losses.gold"], "head_loss", partial(head_loss, impl=impl, budget=budget))
        output = GoldLoss(pair=pair_of(random_heads()), merge=merge, ce_weight=0.5)(student, teacher)
        results.append((*output.terms.values(), torch.autograd.grad(output.loss, hidden)[0]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
