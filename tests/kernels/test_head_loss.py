"""Test that the chunked engine of `head_loss` equals plain torch for every criterion, head and memory budget."""

import copy
import dataclasses
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss import (
    Chunk,
    Criterion,
    CrossEntropy,
    HeadRows,
    WithPrediction,
    head_loss,
    teacher_space,
)
from dwakd.kernels.head_loss import products as head_products
from dwakd.kernels.head_loss.dual_space import ForwardKlSpace, StudentSpace
from dwakd.kernels.head_loss.engine import ChunkedRun, plan_examples, plan_rows
from dwakd.losses.divergences import DIVERGENCES
from dwakd.losses.weights import student_weights

LENGTHS = torch.tensor([3, 0, 5, 1])
ROWS, VOCAB, WIDTH = 9, 11, 4
RATES = {"ce": 0.5, "t2s_ce": 0.7, "kd_student": 0.9}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "scale": 1.7, "soft_cap": 2.0},
}
BUDGETS = {"row": 1, "some": 5 * 8 * VOCAB, "example": 8 * 8 * VOCAB, "all": 2**20}


class SortedGap(Criterion):
    """Criterion without a hand-written gradient that compares whole examples of different lengths and vocabularies."""

    unit = "examples"

    def __init__(self, lengths: tuple[Tensor, Tensor]) -> None:
        super().__init__({"gap": 2.0})
        self.lengths = [side.tolist() for side in lengths]

    def terms(self, logits, chunk, weights):
        total = logits[0].new_zeros(())
        counts = [lengths[chunk.examples] for lengths in self.lengths]
        sides = [side.softmax(-1).split(own) for side, own in zip(logits, counts, strict=True)]
        for student, teacher in zip(*sides, strict=True):
            rows = min(len(student), len(teacher))
            own, other = (side[:rows].sort(-1, descending=True).values for side in (student, teacher))
            columns = min(own.shape[1], other.shape[1])
            total = total + (own[:, :columns] - other[:, :columns]).abs().sum()
        return {"gap": total}


def weigh(statistics, lengths):
    return student_weights(statistics["entropy"], statistics["gate"], lengths)


def space(kind=ForwardKlSpace, temperature=2.0, weigh=weigh, divergence="forward_kl"):
    targets = torch.arange(ROWS) % VOCAB
    return kind(
        targets,
        temperature,
        RATES,
        divergence=DIVERGENCES[divergence],
        weigh=weigh,
        whole_examples=weigh is not None,
    )


def problem(name, head_kind="plain", *, seed=0, dtype=torch.float64, **options):
    """Return (sides, criterion). The student's own head is trained; the other sides use a constant head."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    kinds = dict(HEADS[head_kind])
    bias = tensor(VOCAB) if kinds.pop("bias", False) else None
    head = OutputHead(tensor(VOCAB, WIDTH), bias, **kinds)
    own = HeadRows(tensor(ROWS, WIDTH), head, LENGTHS)
    if name == "ce":
        return [own], CrossEntropy(torch.arange(ROWS) % VOCAB, 0.8)
    if name == "gap":
        lengths = torch.tensor([4, 2, 1, 1])
        other = HeadRows(tensor(8, 6).detach(), OutputHead(tensor(7, 6)).detached(), lengths)
        return [own, other], SortedGap((LENGTHS, lengths))
    other = HeadRows(tensor(ROWS, WIDTH), head.detached(), LENGTHS)
    if name == "teacher":
        constant = dataclasses.replace(own, hidden=own.hidden.detach(), head=head.detached())
        return [other, constant], teacher_space(options.get("temperature", 2.0))
    return [own, other], space(**options)


PROBLEMS = {
    "ce": ("ce", {}),
    "weighted": ("student", {}),
    "unweighted": ("student", {"weigh": None}),
    "teacher": ("teacher", {}),
    "reverse": ("student", {"kind": StudentSpace, "divergence": "reverse_kl"}),
    "gap": ("gap", {}),
}


def leaves(sides):
    found = [t for s in sides for t in (s.hidden, s.head.weight, s.head.bias) if t is not None and t.requires_grad]
    return list({id(t): t for t in found}.values())


def outcome(sides, criterion, **options):
    output = head_loss(sides, criterion, **options)
    gradients = torch.autograd.grad((output.loss * torch.arange(1, output.loss.numel() + 1)).sum() / 3, leaves(sides))
    return output, gradients


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill uninitialised buffers with NaN, so that reading an element before it is written makes a test fail."""
    poisoned = SimpleNamespace(empty=lambda size, dtype: np.full(size, 255, dtype), uint8=np.uint8)
    monkeypatch.setattr(head_products, "np", poisoned)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_change_nothing(name, head, budget):
    """The loss, the terms and all gradients equal those of plain torch on all tokens, for every chunk size."""
    kind, options = PROBLEMS[name]
    sides, criterion = problem(kind, head, **options)
    expected, gradients = outcome(sides, criterion, impl="naive")
    got, ours = outcome(sides, criterion, impl="chunked", budget=BUDGETS[budget])
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-12, rtol=1e-10)
    assert set(got.terms) == set(expected.terms) == set(criterion.rates)
    for term, value in expected.terms.items():
        torch.testing.assert_close(got.terms[term], value, atol=1e-12, rtol=1e-10)
        assert not got.terms[term].requires_grad
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_temperatures(kind, temperature):
    """The engine derives two temperatures from one exponential. Both must be exact for every temperature."""
    sides, criterion = problem(kind, temperature=temperature)
    expected, gradients = outcome(sides, criterion, impl="naive")
    got, ours = outcome(sides, criterion)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-10, rtol=1e-9)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7)


def test_values_by_row_can_be_weighted_afterwards():
    """With `by_row`, weights that the caller applies to the values also scale the gradients."""
    sides, criterion = problem("teacher")
    expected, gradients = outcome(sides, criterion, by_row=True, impl="naive")
    got, ours = outcome(sides, criterion, by_row=True, budget=1)
    assert got.loss.shape == (ROWS,)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.statistics["entropy"], expected.statistics["entropy"])
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("name", ["ce", "unweighted", "teacher"])
def test_gradcheck(name, impl):
    """The gradient agrees with finite differences, also with a bias, a scale and a soft cap."""
    kind, options = PROBLEMS[name]
    sides, criterion = problem(kind, "all", **options)
    criterion.rates = {term: 0.0 if term == "kd_student" else rate for term, rate in criterion.rates.items()}

    own, *others = sides
    constant = [t if t is None else t.detach().clone() for t in (own.head.weight, own.head.bias)]
    others = [dataclasses.replace(o, head=OutputHead(*constant, own.head.scale, own.head.soft_cap)) for o in others]

    def value(*tensors):
        head = dataclasses.replace(own.head, weight=tensors[1], bias=tensors[2]) if len(tensors) > 2 else own.head
        replaced = [dataclasses.replace(own, hidden=tensors[0], head=head), *others]
        return head_loss(replaced, criterion, impl=impl, budget=300).loss

    inputs = (own.hidden, own.head.weight, own.head.bias) if own.head.weight.requires_grad else (own.hidden,)
    assert torch.autograd.gradcheck(value, inputs)


def test_gradcheck_of_the_students_divergence():
    """The gradient of the student-space loss with respect to the student's states agrees with finite differences."""
    sides, criterion = problem("student", "all", weigh=None)
    frozen = dataclasses.replace(sides[1], hidden=sides[1].hidden.detach())

    def value(hidden):
        return head_loss([dataclasses.replace(sides[0], hidden=hidden), frozen], criterion, budget=300).loss

    assert torch.autograd.gradcheck(value, (sides[0].hidden,))


@pytest.mark.parametrize("name", PROBLEMS)
def test_bfloat16_heads_give_float32_statistics(name):
    """With bfloat16 heads, sums over the vocabulary are computed in float32, because bfloat16 loses most of their digits."""
    kind, options = PROBLEMS[name]
    exact, criterion = problem(kind, "bias", **options)
    rounded, _ = problem(kind, "bias", dtype=torch.bfloat16, **options)
    expected, gradients = outcome(exact, criterion)
    got, ours = outcome(rounded, criterion, budget=1)
    assert got.loss.dtype == torch.float32
    assert all(value.dtype in (torch.float32, torch.bool) for value in got.statistics.values())
    torch.testing.assert_close(got.loss.double(), expected.loss, atol=0.02, rtol=0.05)
    for a, b in zip(ours, gradients, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, atol=0.1, rtol=0.1)


def test_float32_stays_close_to_float64_on_a_large_vocabulary():
    """With 50,000 tokens, the float32 loss and gradients stay close to those in float64."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(50_000, 8), torch.randn(2, 6, 8) * 2
    losses, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        head = OutputHead(weight.to(dtype).requires_grad_())
        own, other = (rows.to(dtype).requires_grad_() for rows in hidden)
        lengths = torch.tensor([4, 2])
        criterion = ForwardKlSpace(torch.arange(6), 2.0, RATES, weigh=weigh, whole_examples=True)
        output = head_loss([HeadRows(own, head, lengths), HeadRows(other, head.detached(), lengths)], criterion)
        losses.append(output.loss.double())
        gradients.append([g.double() for g in torch.autograd.grad(output.loss, (own, other, head.weight))])
    torch.testing.assert_close(*losses, rtol=2e-6, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_forbidden_tokens_add_nothing(name, impl):
    """Tokens that a bias of -inf forbids add 0 to the loss and the gradient. They must not cause NaN as 0 x inf."""
    sides, criterion = problem(name, "bias")
    with torch.no_grad():
        sides[0].head.bias[VOCAB - 1] = -math.inf
    head = sides[0].head
    shorter = OutputHead(head.weight[: VOCAB - 1].detach(), head.bias[: VOCAB - 1].detach())
    without = [dataclasses.replace(side, head=shorter) for side in sides]
    expected, got = head_loss(without, criterion, impl="naive"), head_loss(sides, criterion, impl=impl)
    torch.testing.assert_close(got.loss, expected.loss)
    inputs = [side.hidden for side in sides if side.hidden.requires_grad]
    wanted = torch.autograd.grad(expected.loss, inputs)
    for a, b in zip(torch.autograd.grad(got.loss, inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_reaches_the_loss():
    """NaN in a hidden state makes the loss NaN, so that training stops."""
    sides, criterion = problem("student")
    with torch.no_grad():
        sides[0].hidden[4] = math.nan
    assert head_loss(sides, criterion).loss.isnan()


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_rows(name):
    """A batch without tokens has loss 0 and zero gradients."""
    kind, options = PROBLEMS[name]
    sides, criterion = problem(kind, "bias", **options)
    none = [dataclasses.replace(s, hidden=s.hidden[:0], lengths=torch.zeros(2, dtype=torch.long)) for s in sides]
    if name == "gap":
        criterion.lengths = [[0, 0], [0, 0]]
    output = head_loss(none, criterion)
    assert output.loss == 0
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(output.loss, leaves(none)))


def test_nothing_is_differentiated_without_grad(monkeypatch):
    """Under `torch.no_grad` the engine computes no gradient, which would triple the time of an evaluation."""
    sides, criterion = problem("student")
    asked = []
    original = criterion.differentiate

    def spy(logits, chunk, statistics, weights, needs):
        asked.append(list(needs))
        return original(logits, chunk, statistics, weights, needs)

    monkeypatch.setattr(criterion, "differentiate", spy)
    trained = head_loss(sides, criterion).loss
    with torch.no_grad():
        evaluated = head_loss(sides, criterion).loss
    assert not evaluated.requires_grad
    assert asked == [[True, True], [False, False]]
    torch.testing.assert_close(trained.detach(), evaluated)


def test_backward_twice_and_scaled():
    """The gradient scales with the upstream gradient, and a retained graph gives the same gradient again."""
    sides, criterion = problem("student")
    inputs = leaves(sides)
    once = torch.autograd.grad(head_loss(sides, criterion).loss, inputs)
    loss = head_loss(sides, criterion).loss * torch.tensor(0.25)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, inputs, retain_graph=True), once, strict=True):
            torch.testing.assert_close(a, b / 4)


def test_double_backward_is_refused():
    """A second derivative, which the engine cannot compute, raises an error instead of returning 0."""
    sides, criterion = problem("ce")
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = head_loss(sides, criterion).loss * factor
    (gradient,) = torch.autograd.grad(loss, sides[0].hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_follows_the_budget_not_the_batch():
    """The buffer stays within the budget for a larger batch and for one example that exceeds the budget."""
    head = OutputHead(torch.randn(1000, 4))
    budget = 2 * 1000 * 4 * 16
    for lengths in ([20, 20], [20] * 8, [160]):
        rows = [HeadRows(torch.randn(sum(lengths), 4, requires_grad=True), head, torch.tensor(lengths)) for _ in "st"]
        for whole in (True, False):
            criterion = ForwardKlSpace(
                torch.zeros(sum(lengths), dtype=torch.long), 2.0, RATES, weigh=weigh, whole_examples=whole
            )
            ((_, products),) = ChunkedRun(rows, criterion, budget, by_row=False).products
            assert products.buffer.numel() * 4 <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_logits_begin_at_a_cache_line(dtype):
    """Each row of logits begins at a cache line. Otherwise a matrix product takes up to a fifth more time."""
    head = OutputHead(torch.randn(7, 4, dtype=dtype))
    for rows in (1, 5, 16, 33):
        made = head_products.HeadProducts(head, rows, with_gradient=False)
        (logits,) = made.logits([torch.randn(rows, 4, dtype=dtype)])
        assert logits.shape == (rows, 7)
        assert logits.data_ptr() % 64 == logits.stride(1) * logits.itemsize % 64 == 0


def test_a_part_of_a_head_is_not_that_head():
    """A slice of a head begins at the same memory address as the head but must get a separate matrix product."""
    weight = torch.randn(VOCAB, WIDTH)
    heads = [OutputHead(weight), OutputHead(weight[:4]), OutputHead(weight.as_strided((4, WIDTH), (2 * WIDTH, 1)))]
    sides = [HeadRows(torch.randn(3, WIDTH), head, torch.tensor([3])) for head in heads]
    assert len(ChunkedRun(sides, CrossEntropy(torch.zeros(3, dtype=torch.long)), 2**20, by_row=False).products) == 3


def test_one_product_for_sides_that_share_a_head():
    """Sides with the same head share one matrix product, because two smaller products take a third more time."""
    sides, criterion = problem("student")
    assert len(ChunkedRun(sides, criterion, 2**20, by_row=False).products) == 1


def test_plans_cover_every_row_once():
    """The chunks cover every token and every example exactly once, within the budget where this is possible."""
    for budget in (1, 7, 30, 10**6):
        groups = plan_rows(23, 2, 3, budget)
        assert [r for (chunk,) in groups for r in range(*chunk.rows[1].indices(99))] == list(range(23))
        for divisible in (True, False):
            lengths = [[3, 0, 9, 1, 0], [3, 0, 9, 1, 0]] if divisible else [[3, 0, 9, 1, 0], [1, 4, 2, 0, 0]]
            groups = plan_examples(lengths, [2, 2], budget, divisible=divisible)
            chunks = [chunk for group in groups for chunk in group]
            for side in (0, 1):
                covered = [row for chunk in chunks for row in range(*chunk.rows[side].indices(99))]
                assert covered == list(range(sum(lengths[side])))
            assert [e for group in groups for e in range(*group[0].examples.indices(99))] == list(range(5))
            assert all(chunk.examples == group[0].examples for group in groups for chunk in group)
            if divisible and budget >= 4:
                assert all(4 * (chunk.rows[0].stop - chunk.rows[0].start) <= budget for chunk in chunks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "triton"}, "unknown impl 'triton'; valid are 'auto', 'naive', 'chunked'"),
        ({"budget": 0}, "budget must be at least 1 byte, got 0"),
        ({"by_row": True}, r"by_row .* head\.detached\(\)"),
    ],
)
def test_mistakes_are_named(options, message):
    """Invalid arguments raise a ValueError that names the argument, instead of giving a wrong gradient."""
    sides, criterion = problem("student")
    with pytest.raises(ValueError, match=message):
        head_loss(sides, criterion, **options)
    short = dataclasses.replace(sides[1], hidden=sides[1].hidden[:-1])
    with pytest.raises(ValueError, match=r"tokens.* \[9, 8\]"):
        head_loss([sides[0], short], criterion)


@pytest.mark.parametrize("target", [-1, -100, VOCAB])
@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("name", ["ce", "weighted", "reverse"])
def test_targets_that_are_no_tokens_are_named(name, impl, target):
    """A target that is not a token id raises a ValueError.

    A label of -100 would otherwise index from the end of the vocabulary.
    """
    kind, options = PROBLEMS[name]
    sides, criterion = problem(kind, **options)
    for field in ("targets", "projected_targets") if kind == "student" else ("targets",):
        wrong = copy.copy(criterion)
        setattr(wrong, field, criterion.targets.index_fill(0, torch.tensor([2]), target))
        for given in (wrong, WithPrediction(wrong, 0)):
            with pytest.raises(ValueError, match=rf"token ids from 0 to {VOCAB - 1}.* got {target}"):
                head_loss(sides, given, impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ce", "weighted", "teacher", "reverse"])
def test_half_precision_costs_no_more_than_in_plain_torch(name, dtype, monkeypatch):
    """With half-precision inputs, the error against float64 is not larger than that of torch computing in this dtype."""
    monkeypatch.setattr(sys.modules[__name__], "VOCAB", 3000)
    kind, options = PROBLEMS[name]
    sides, criterion = problem(kind, dtype=dtype, **options)
    expected, gradients = outcome([exact(side) for side in sides], criterion, impl="naive")
    got, ours = outcome(sides, criterion, budget=1)

    logits = [torch.nn.functional.linear(side.hidden, side.head.weight) for side in sides]
    chunk = Chunk(tuple(slice(0, ROWS) for _ in sides), slice(0, len(LENGTHS)))
    weights = criterion.weights(criterion.statistics([side.detach() for side in logits], chunk), LENGTHS)
    terms = criterion.terms(logits, chunk, weights)
    plain = torch.stack([criterion.rates[term] * value.sum() for term, value in terms.items()]).sum()
    assert plain.dtype == dtype
    references = torch.autograd.grad(plain / 3, leaves(sides))

    step = torch.finfo(dtype).eps
    assert (got.loss - expected.loss).abs() <= (plain - expected.loss).abs() + step / 8 * expected.loss.abs()
    for mine, reference, truth in zip(ours, references, gradients, strict=True):
        error, allowed = ((gradient.double() - truth).norm() for gradient in (mine, reference))
        assert error <= allowed + step / 2 * truth.norm()


def exact(side):
    """Return a side with the same hidden states and head in float64."""
    hidden, weight = (
        tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (side.hidden, side.head.weight)
    )
    return dataclasses.replace(side, hidden=hidden, head=OutputHead(weight))
