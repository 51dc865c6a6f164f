"""Test SRA: spans, weights and the three terms against loops over examples and spans."""

import dataclasses
import sys
from functools import partial

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from dwakd.batch import ModelSide, OutputHead
from dwakd.kernels.head_loss import head_loss
from dwakd.losses import ModelPair, SraLoss
from dwakd.losses.sra import gram_distance, pool
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side, smallest_pair, use_kernels

ENDS = [([2, 3, 5, 5], [1, 3, 4, 5, 5]), ([1, 4, 4], [2, 4, 4, 4]), ([3], [3]), ([1, 2, 3, 7, 7], [1, 2, 7, 7])]
SPANS = [
    [([0, 1], [0, 1]), ([2], [2, 3]), ([3], [4])],
    [([0, 1], [0, 1]), ([2], [2, 3])],
    [([0], [0])],
    [([0], [0]), ([1], [1]), ([2, 3], [2]), ([4], [3])],
]
"""Positions of student and teacher in each span of the examples."""


def ragged(order=(0, 1, 2, 3)) -> tuple[ModelSide, ModelSide]:
    """Return four examples in float64; the student's tensors require gradients."""
    examples, heads = random_examples([(len(s), len(t)) for s, t in ENDS]), random_heads()
    sides = []
    for n, name in enumerate(("student", "teacher")):
        rows = side([examples[i] for i in order], name, heads[n].requires_grad_(name == "student"))
        ends = torch.cat([torch.tensor(ENDS[i][n]) for i in order])
        hidden = rows.hidden.requires_grad_(name == "student")
        sides.append(dataclasses.replace(rows, hidden=hidden, byte_ends=ends))
    return sides[0], sides[1]


def build(pair: ModelPair | None = None, **options) -> SraLoss:
    torch.manual_seed(0)
    return SraLoss(pair=pair or pair_of(random_heads()), **options).double()


def twin(loss: SraLoss, student: ModelSide, teacher: ModelSide, temperature: float) -> dict[str, torch.Tensor]:
    """Compute the terms by loops over examples, spans and pairs of spans."""
    totals: dict[str, torch.Tensor] = {
        "ce": cross_entropy(student.head.logits(student.hidden), student.target_ids, reduction="sum")
    }
    starts = [0, 0]
    for spans, ends in zip(SPANS, ENDS, strict=True):
        own, theirs, shares = [], [], []
        for span in spans:
            places = [[start + row for row in rows] for start, rows in zip(starts, span, strict=True)]
            for states, model, rows in zip((own, theirs), (student, teacher), places, strict=True):
                mass = model.attention[rows] if loss.needs_attention else torch.ones(len(rows)).double()
                states.append((mass[:, None] * model.hidden[rows]).sum(0) / mass.sum())
            shares.append(mass.sum())
        weights = [share / sum(shares) for share in shares]
        found = dict.fromkeys(("span", "geo", "kd"), torch.zeros(()).double())
        total_pairs = torch.zeros(()).double()
        for k, (s, t) in enumerate(zip(own, theirs, strict=True)):
            found["span"] = found["span"] + weights[k] * (1 - cosine_similarity(loss.projector(s), t, dim=0))
            # the shared tokens are the letters d to j and the end token, which is the last one of both
            log_q = (student.head.logits(s[None])[0, [*range(3, 10), 10]] / temperature).log_softmax(0)
            log_p = (teacher.head.logits(t[None])[0, [*range(7), 12]] / temperature).log_softmax(0)
            found["kd"] = found["kd"] + (log_p.exp() * (log_p - log_q)).sum() / len(spans)
            for j in (j for j in range(len(spans)) if j != k):
                difference = cosine_similarity(s, own[j], dim=0) - cosine_similarity(t, theirs[j], dim=0)
                found["geo"] = found["geo"] + weights[k] * weights[j] * difference**2
                total_pairs += weights[k] * weights[j]
        found["geo"] = found["geo"] / (total_pairs or 1.0)
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + len(ends[0]) * value
        starts = [start + len(rows) for start, rows in zip(starts, ends, strict=True)]
    return {name: total / len(student.target_ids) for name, total in totals.items()}


@pytest.mark.parametrize("budget", [1, 200, 2**27])
@pytest.mark.parametrize(("span_weights", "temperature"), [("uniform", 0.7), ("attention", 2.0)])
def test_value_and_gradient_are_those_of_the_formulas(monkeypatch, budget, span_weights, temperature):
    """Terms and gradients equal those of the loops, for several chunk sizes and both kinds of span weights."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    loss = build(kd_rate=0.3, geo_weight=7.0, temperature=temperature, span_weights=span_weights)
    student, teacher = ragged()
    output, expected = loss(student, teacher), twin(loss, student, teacher, temperature)
    for name, value in expected.items():
        assert output.terms[name].item() == pytest.approx(value.item(), rel=1e-6), name
    total = 0.7 * expected["ce"] + 0.3 * (expected["span"] + 7 * expected["geo"] + expected["kd"])
    leaves = [student.hidden, student.head.weight, *loss.parameters()]
    gradients = [torch.autograd.grad(value, leaves) for value in (output.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_chunks_are_the_plain_formula(monkeypatch):
    """The hand-written gradient equals autograd through `terms`."""
    results = []
    for impl in ("chunked", "naive"):
        use_kernels(monkeypatch, head_loss=partial(head_loss, impl=impl))
        student, teacher = ragged()
        output = build()(student, teacher)
        results.append((*output.terms.values(), *torch.autograd.grad(output.loss, [student.hidden])))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_order_of_examples_changes_nothing():
    """The terms do not depend on the order of the examples, although spans are numbered over the whole batch."""
    loss = build()
    expected, got = loss(*ragged()).terms, loss(*ragged((2, 3, 0, 1))).terms
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-12, rtol=1e-10)


def one_tokenizer(hidden: torch.Tensor, teacher_hidden: torch.Tensor, heads) -> tuple[SraLoss, ModelSide, ModelSide]:
    """Return two models with the same tokenizer and width, and a loss whose projector is the identity."""
    student, teacher = ragged()
    teacher = dataclasses.replace(student, hidden=teacher_hidden, head=OutputHead(heads[1]))
    student = dataclasses.replace(student, hidden=hidden, head=OutputHead(heads[0]))
    tokens = pair_of(heads).student_tokens
    widths = dataclasses.replace(WIDTHS, teacher_hidden=hidden.shape[1])
    pair = ModelPair(widths, tokens, tokens, OutputHead(heads[0]), OutputHead(heads[1]), (10, 10))
    loss = build(pair, span_weights="uniform")
    loss.projector.weight.data.copy_(torch.eye(hidden.shape[1]))
    loss.projector.bias.data.zero_()
    return loss, student, teacher


def test_with_one_tokenizer_spans_are_tokens():
    """With one tokenizer, L_kd is the KL of each token and L_span the cosine distance of its states."""
    generator = torch.Generator().manual_seed(5)
    own, theirs = (torch.randn(13, 6, generator=generator).double() for _ in range(2))
    heads = [torch.randn(11, 6, generator=generator).double() for _ in range(2)]
    loss, student, teacher = one_tokenizer(own, theirs, heads)
    terms = loss(student, teacher).terms
    log_q, log_p = ((rows @ head.T / 2).log_softmax(-1) for rows, head in zip((own, theirs), heads, strict=True))
    torch.testing.assert_close(terms["kd"], (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    torch.testing.assert_close(terms["span"], (1 - cosine_similarity(own, theirs)).mean())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    """If student and teacher are equal, all distillation terms are 0."""
    hidden, head = torch.randn(13, 6).double(), torch.randn(11, 6).double()
    loss, student, teacher = one_tokenizer(hidden, hidden.clone(), [head, head.clone()])
    terms = loss(student, teacher).terms
    assert all(abs(terms[name].item()) < 1e-12 for name in ("span", "geo", "kd"))
    assert terms["loss"].item() == pytest.approx(terms["ce"].item() / 2)


@pytest.mark.parametrize("width", [6, 9])
def test_geometry_does_not_depend_on_rotation(width):
    """L_geo does not change if the states are rotated, scaled or embedded in a wider space."""
    student, teacher = ragged()
    rotation = torch.linalg.qr(torch.randn(width, width).double()).Q[:6]
    lengths, weights = torch.tensor([4, 1, 8]), torch.rand(13).double()
    rotated = 3 * student.hidden @ rotation
    assert gram_distance(student.hidden, rotated, weights, lengths).abs().max() < 1e-24
    assert gram_distance(student.hidden, teacher.hidden[:13], weights, lengths)[[0, 2]].min() > 0.01


def test_an_example_of_one_span_has_no_geometry():
    """L_geo of an example with one span is 0 with zero gradient, not NaN."""
    rows = torch.randn(2, 4).requires_grad_()
    values = gram_distance(rows, torch.randn(2, 5), torch.ones(2), torch.tensor([1, 1]))
    assert values.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(1e6 * values.sum(), rows)  # the weight of the term can be large
    assert not gradient.any()


def test_a_span_without_attention_has_equal_weights():
    """A span without attention, as outside a sliding window, is averaged with equal weights and has weight 0."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    states, mass = pool(hidden, torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(states, torch.tensor([[0.5, 0.5], [3.0, 3.0]]))
    torch.testing.assert_close(mass, torch.tensor([0.0, 2.0]))


def test_options_and_vocabularies_are_checked():
    """Invalid options, missing attention and vocabularies without a shared token raise a ValueError."""
    SraLoss(pair=smallest_pair())
    with pytest.raises(ValueError, match="span_weights must be 'attention' or 'uniform'"):
        SraLoss(pair=smallest_pair(), span_weights="mean")
    student, teacher = ragged()
    with pytest.raises(ValueError, match=r"sra .*attention.*span_weights=uniform"):
        build()(student, dataclasses.replace(teacher, attention=None))
    for options in ({"kd_rate": 1.5}, {"geo_weight": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at"):
            SraLoss(pair=smallest_pair(), **options)
    unmatched = dataclasses.replace(smallest_pair(), teacher_tokens=(b"b",))
    with pytest.raises(ValueError, match="share no token"):
        SraLoss(pair=unmatched)
