"""Test the properties that every method must have."""

import copy
import dataclasses
import itertools
import math
import typing
from functools import partial

import pytest
import torch

from dwakd.errors import UserError
from dwakd.kernels import head_loss, sinkhorn, soft_dtw
from dwakd.kernels.head_loss import only_term, scaled_terms
from dwakd.losses import METHODS, DistillationLoss, TeacherScale, Widths, build_loss
from dwakd.losses.divergences import DIVERGENCES
from tests.losses.builders import pair_of, random_examples, random_heads, side, use_kernels

LENGTHS = [(5, 7), (9, 4), (1, 2), (6, 6)]
WIDTHS = Widths(6, 8, 6, 8)
VARIANTS = [
    ("dskd", {"alignment": "position"}),
    ("dskd", {"alignment": "bytes"}),
    ("dwa_kd", {"variant": "recommended"}),
    ("dwa_kd", {"alignment": "causal_attention", "values": "hidden"}),
    ("uld", {"variant": "dskd"}),
    ("multilevel_ot", {"variant": "mcw_kd"}),
    ("x_token", {"objective": "h_kl"}),
    ("simct", {"variant": "simple_ctkd"}),
    ("x_token", {"vocab_topk": 8, "top_k": 2}),
    (
        "sum",
        {"losses": [{"method": "dwa_kd", "entropy_weights": False, "gate": False}, {"method": "alm", "weight": 0.5}]},
    ),
]
"""Options that change what a method computes."""
ALL = [(name, {}) for name in METHODS] + VARIANTS


@pytest.fixture(params=ALL, ids=lambda p: "-".join([p[0], *map(str, p[1].values())]))
def method(request):
    torch.manual_seed(0)
    name, options = request.param
    return name, build(name, options)


def build(name, options=None):
    return build_loss(name, options, widths=WIDTHS, pair=pair_of(random_heads())).double()


def batch(loss, lengths=LENGTHS):
    """Return random examples and heads. Both sides have equal lengths if the method requires one tokenizer."""
    if loss.options.needs_same_vocabulary:
        lengths = [(rows, rows) for rows, _ in lengths]
    return random_examples(lengths), random_heads()


def leaves(examples, heads):
    tensors = [e[key] for e in examples for key in e if e[key].is_floating_point()]
    return [t.requires_grad_() for t in (*tensors, *heads)]


def run(loss, examples, heads, **options):
    return loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1]), **options)


def test_gradient_reaches_the_student_and_own_parameters_never_the_teacher(method):
    """Gradient reaches the student and every parameter of the loss, but not the teacher."""
    name, loss = method
    examples, heads = batch(loss)
    leaves(examples, heads)
    output = run(loss, examples, heads)
    assert output.loss.ndim == 0
    assert torch.isfinite(output.loss)
    assert {"ce", "loss"} <= set(output.terms)
    assert not any(term.requires_grad for term in output.terms.values())
    output.loss.backward()
    for example in examples:
        assert example["student_hidden"].grad.abs().sum() > 0
        assert all(example[key].grad is None for key in ("teacher_hidden", "teacher_in", "teacher_out", "student_in"))
    assert heads[0].grad.abs().sum() > 0
    assert heads[1].grad is None
    for parameter in loss.parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or parameter.ndim == 1


def test_the_gradient_is_the_sum_of_the_gradients_of_the_terms(method):
    """The logged gradient norms of terms would be wrong if a term could not be computed without the others."""
    _, loss = method
    examples, heads = batch(loss)
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    hidden = student.hidden.detach().requires_grad_()
    student = dataclasses.replace(student, hidden=hidden)

    def gradient():
        value = loss(student, teacher).loss
        return torch.autograd.grad(value, hidden, allow_unused=True, materialize_grads=True)[0]

    parts = {}
    for name in loss.terms:
        with only_term(name):
            parts[name] = gradient()
    torch.testing.assert_close(sum(parts.values()), gradient(), atol=1e-12, rtol=1e-8)
    scales = {name: 0.25 + 0.5 * number for number, name in enumerate(loss.terms)}
    with scaled_terms(scales):
        scaled = gradient()
        values = loss(student, teacher).terms
    torch.testing.assert_close(scaled, sum(scales[name] * part for name, part in parts.items()), atol=1e-12, rtol=1e-8)
    for name, value in loss(student, teacher).terms.items():
        assert name == "loss" or values[name] == value, "a scale must not change the logged term"
    assert parts["ce"].abs().sum() > 0 or loss.options.cross_entropy_weight == 0
    assert sum(part.abs().sum() > 0 for part in parts.values()) > 1 or not loss.options.needs_teacher


def test_only_the_base_class_checks_and_reduces(method):
    """No method overrides `forward`, so all methods check the sides and divide by the number of tokens in the same way."""
    assert type(method[1]).forward is DistillationLoss.forward


def test_the_students_head_learns_from_its_own_logits_only(method):
    """The student's head gets gradient from the student's own logits. Projected logits use it as a constant."""
    _, loss = method
    examples, heads = batch(loss)
    student, teacher = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    head = heads[0].clone().requires_grad_()
    own_only = dataclasses.replace(student, head=dataclasses.replace(student.head, weight=head))
    loss(own_only, teacher).loss.backward()
    assert head.grad is not None
    if hasattr(loss, "kd_weight"):
        loss.kd_weight = 0.0
        before = head.grad.clone()
        head.grad = None
        loss(own_only, teacher).loss.backward()
        assert not torch.allclose(before, head.grad), "student-space KD moves the head through the student's own logits"


def test_batch_order_changes_nothing(method):
    """The terms do not depend on the order of the examples in the batch."""
    _, loss = method
    examples, heads = batch(loss)
    order = [2, 0, 3, 1]
    expected, got = run(loss, examples, heads), run(loss, [examples[i] for i in order], heads)
    for name, value in expected.terms.items():
        torch.testing.assert_close(got.terms[name], value, atol=1e-12, rtol=1e-10)


def test_splitting_the_batch_changes_nothing(method):
    """The losses and gradients of several micro-batches sum to those of the whole batch."""
    _, loss = method
    examples, heads = batch(loss)
    tensors = leaves(examples, heads)
    whole = run(loss, examples, heads)
    expected = torch.autograd.grad(whole.loss, [*tensors, *loss.parameters()], allow_unused=True)
    scale = TeacherScale.merge([TeacherScale.of(side([e], "teacher", heads[1])) for e in examples])
    num_tokens = sum(s for s, _ in LENGTHS)
    parts = [
        run(loss, examples[part], heads, num_tokens=num_tokens, teacher_scale=scale)
        for part in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, atol=1e-12, rtol=1e-10)
    got = torch.autograd.grad(total, [*tensors, *loss.parameters()], allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_gradcheck(method):
    """The gradient agrees with finite differences along a random direction. Token weights, which are constants, are off."""
    name, loss = method
    if name in ("dwa_kd", "dwa_kd_v2"):
        loss = build(name, {"entropy_weights": False, "gate": False})
    examples, heads = batch(loss, [(3, 4), (2, 2)])

    def value(*hidden):
        for example, rows in zip(examples, hidden, strict=True):
            example["student_hidden"] = rows
        return run(loss, examples, heads).loss

    hidden = tuple(example["student_hidden"].clone().requires_grad_() for example in examples)
    assert torch.autograd.gradcheck(value, hidden, fast_mode=True)


def test_num_tokens_may_be_a_tensor(method):
    """`num_tokens` may be a tensor, which the trainer passes to avoid synchronising the device."""
    _, loss = method
    examples, heads = batch(loss)
    tensors = leaves(examples, heads)
    results = []
    for num_tokens in (50.0, torch.tensor(50)):
        output = run(loss, examples, heads, num_tokens=num_tokens)
        results.append((output.terms, torch.autograd.grad(output.loss, tensors, allow_unused=True)))
    (terms, gradients), (other_terms, other_gradients) = results
    torch.testing.assert_close(other_terms, terms)
    for a, b in zip(other_gradients, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "forward_kl"])
def test_other_divergences_in_chunks(name, monkeypatch):
    """Divergences without a hand-written gradient give the same terms and gradients in chunks of one token."""
    torch.manual_seed(0)
    loss = build_loss("dwa_kd", {"student_divergence": name}, widths=WIDTHS).double()
    examples, heads = random_examples(LENGTHS), random_heads()
    tensors = leaves(examples, heads)
    whole = run(loss, examples, heads)
    expected = torch.autograd.grad(whole.loss, tensors, allow_unused=True)
    monkeypatch.setattr("dwakd.losses.dwa_kd.head_loss", partial(head_loss, budget=1))
    cut = run(loss, examples, heads)
    torch.testing.assert_close(cut.terms, whole.terms)
    for a, b in zip(torch.autograd.grad(cut.loss, tensors, allow_unused=True), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_autocast_does_not_change_a_loss(method):
    """In a caller's own loop with mixed precision, costs and positions of Soft-DTW would be rounded to bfloat16."""
    _, loss = method
    examples, heads = batch(loss.float())
    examples = [{k: v.float() if v.is_floating_point() else v for k, v in each.items()} for each in examples]
    heads = tuple(head.float() for head in heads)
    expected = run(loss, examples, heads)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(loss, examples, heads)
    assert found.loss.dtype == torch.float32
    assert found.terms == expected.terms


def test_bfloat16_rows_give_a_finite_loss_close_to_float64(method):
    """bfloat16 hidden states give a float32 loss that is close to the one in float64."""
    _, loss = method
    examples, heads = batch(loss)
    expected = run(loss, examples, heads).loss.item()
    low = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in e.items()} for e in examples]
    output = run(loss.float(), low, tuple(head.bfloat16() for head in heads))
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected, rel=0.05)


def test_state_survives_a_round_trip(method):
    """The state dict contains all learned parameters, so that a resumed run has the same loss."""
    _, loss = method
    other = copy.deepcopy(loss)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(loss.state_dict())
    examples, heads = batch(loss)
    torch.testing.assert_close(run(loss, examples, heads).loss, run(other, examples, heads).loss)


def test_bad_options_are_named(method):
    """An unknown option raises a UserError that names it, instead of being ignored."""
    name, _ = method
    with pytest.raises(UserError, match=r"unknown option loss\.tau of method .* valid ones"):
        build(name, {"tau": 2.0})


@pytest.mark.parametrize(
    ("method_name", "options", "message"),
    [
        ("dwa_kd", {"temperature": -1}, "temperature must be at least 0.001"),
        ("dwa_kd", {"student_divergence": "kl"}, "divergence must be 'forward_kl', .*, got 'kl'"),
        ("dwa_kd", {"variant": "mine"}, "variant must be .*'authors'"),
        ("dwa_kd", {"gate_warmup_steps": 5}, "gate_warmup_steps .*entropy_then_gate"),
        ("dwa_kd", {"gamma_end": 1.0}, "gamma_end .*gamma_steps"),
        (
            "dwa_kd",
            {"gate_warmup_steps": 5, "gate": False, "weight_normalisation": "entropy_then_gate"},
            "gate_warmup_steps requires gate=true",
        ),
        ("dskd", {"kd_rate": 2}, "kd_rate must be at most 1, got 2"),
        ("dwakd", {}, "unknown method 'dwakd'; did you mean dwa_kd\\? valid ones: sft, kd, "),
        ("kd", {"divergence": "kl"}, "divergence must be 'forward_kl', .*, got 'kl'"),
        ("uld", {"variant": "mine"}, "variant must be 'paper' or 'dskd', got 'mine'"),
        ("uld", {"uld_weight": -1}, "uld_weight must be at least 0"),
        ("multilevel_ot", {"variant": "hust"}, "variant must be 'paper' or 'mcw_kd'"),
        ("multilevel_ot", {"top_k": 0}, "top_k must be at least 1"),
        ("kd", {"temperature": 0}, "temperature must be at least 0.001"),
        ("dskd_v2", {"kd_rate": 2}, "kd_rate must be at most 1, got 2"),
        ("dskd_v2", {"divergence": "kl"}, "divergence must be 'forward_kl', .*, got 'kl'"),
        ("dwa_kd_v2", {"gamma": 0}, "gamma must be at least 0.000001"),
        ("dwa_kd_v2", {"impl": "fast"}, "impl must be 'auto', .*'fast'"),
    ],
)
def test_bad_values_are_named(method_name, options, message):
    """A value that is not allowed raises a UserError when the loss is built, before any model is loaded."""
    with pytest.raises(UserError, match=message):
        build(method_name, options)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("scale", [0.0, 1e2, 1e3, 1e4])
def test_extreme_logits(method, scale, impl, monkeypatch):
    """Loss, terms and gradients are finite for logits that are all 0 or very large."""
    use_kernels(monkeypatch, head_loss=partial(head_loss, impl=impl))
    loss = method[1].float()
    examples, heads = batch(loss)
    examples = [{k: v.float() if v.is_floating_point() else v for k, v in e.items()} for e in examples]
    tensors = leaves(examples, [heads[0].float() * scale, heads[1].float() * scale])
    output = run(loss, examples, tensors[-2:])
    gradients = torch.autograd.grad(output.loss, [*tensors, *loss.parameters()], allow_unused=True)
    assert all(value.isfinite() for value in (output.loss, *output.terms.values()))
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def train(name, options, optimiser, dtype):
    """Train six steps on one batch; return the losses and the trained tensors."""
    loss = build(name, options).to(dtype)
    examples, heads = batch(loss)
    examples = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in e.items()} for e in examples]
    head = heads[0].to(dtype).requires_grad_()
    learned = [example[key].requires_grad_() for example in examples for key in ("student_hidden", "student_out")]
    learned += [head, *loss.parameters()]
    steps, losses = optimiser(learned), []
    for step in range(6):
        loss.set_step(step)
        output = run(loss, examples, (head, heads[1].to(dtype)))
        losses.append(output.loss.detach())
        steps.zero_grad()
        output.loss.backward()
        steps.step()
    return torch.stack(losses), [tensor.detach() for tensor in learned]


@pytest.mark.parametrize(
    ("optimiser", "dtype", "tolerance"),
    [
        (partial(torch.optim.AdamW, lr=0.02), torch.float64, 1e-8),
        (partial(torch.optim.SGD, lr=0.02, momentum=0.9), torch.float32, 2e-4),
    ],
    ids=["AdamW", "SGD-float32"],
)
@pytest.mark.parametrize(("name", "options"), ALL)
def test_six_steps_of_fast_kernels(name, options, optimiser, dtype, tolerance, monkeypatch):
    """Six steps with the fast kernels give the losses and weights of six steps with the naive kernels."""
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        use_kernels(patch, **{k.__name__: partial(k, impl="naive") for k in (head_loss, sinkhorn, soft_dtw)})
        expected = train(name, options, optimiser, dtype)
    torch.manual_seed(1)
    use_kernels(monkeypatch, head_loss=partial(head_loss, budget=600))
    got = train(name, options, optimiser, dtype)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert got[0][-1] < got[0][0]


def numbers(name, kind):
    """Return the names of the options of a method that have a numeric type."""
    fields = METHODS[name].options_type.model_fields
    kinds = {key: (field.annotation, *typing.get_args(field.annotation)) for key, field in fields.items()}
    return [key for key, found in kinds.items() if kind in [getattr(part, "__origin__", part) for part in found]]


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_infinite_are_named(name):
    """Infinite numbers, and those that are infinite in float32, raise an error that names the option."""
    values = {float: (math.inf, -math.inf, math.nan, 1e39, 10**400), int: (10**400, -(10**400))}
    for kind, wrong in values.items():
        for option, value in itertools.product(numbers(name, kind), wrong):
            with pytest.raises(ValueError, match=rf"^{option} .*"):
                METHODS[name](**{option: value}, **needs(name))
    assert numbers("dwa_kd", float)


def needs(name):
    pair = pair_of(random_heads())
    needed = METHODS[name].options_type.needs_models
    return {needed: {"widths": WIDTHS, "pair": pair}[needed]} if needed else {}


@pytest.mark.parametrize("name", METHODS)
def test_temperatures_have_a_bound_that_keeps_the_cross_entropy_right(name):
    """The kernels derive the cross-entropy from exponentials at the temperature.

    It stays accurate up to the largest allowed temperature.
    """
    softened = [option for option in numbers(name, float) if option in ("temperature", "sequence_temperature")]
    for option in softened:
        with pytest.raises(ValueError, match=rf"{option} must be at most 1000"):
            METHODS[name](**{option: 1e4}, **needs(name))
        found = []
        for temperature in (1.0, 1e3):
            loss = build(name, {option: temperature}).float()
            examples, heads = batch(loss)
            examples = [{k: v.float() if v.is_floating_point() else v for k, v in e.items()} for e in examples]
            found.append(run(loss, examples, [head.float() for head in heads]).terms["ce"].item())
        assert found[1] == pytest.approx(found[0], abs=1e-3)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("name", ["dskd_v2", "dwa_kd_v2", "kd"])
def test_a_divergence_that_is_always_zero(name, impl, monkeypatch):
    """With `skew: 1` the skewed forward KL compares the teacher with itself, so no logits have a gradient from it."""
    use_kernels(monkeypatch, head_loss=partial(head_loss, impl=impl))
    loss = build(name, {"divergence": "skewed_forward_kl", "skew": 1.0})
    examples, heads = batch(loss)
    leaves(examples, heads)
    output = run(loss, examples, heads)
    output.loss.backward()
    assert output.loss.isfinite()
    assert heads[0].grad.isfinite().all()
