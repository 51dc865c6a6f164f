"""Test DSKDv2 against a literal float64 implementation and in special cases."""

import dataclasses

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.losses import DskdV2Loss, ModelPair, Widths
from dwakd.losses.divergences import DIVERGENCES
from tests.losses import reference_v2
from tests.losses.builders import pair_of, random_examples, random_heads, side

NAMES = ("ce", "t2s_ce", "kd_student", "kd_teacher")


def sided(examples, heads, ends):
    """Return both sides with the given byte ends of each example."""
    flat = [torch.tensor([end for pair in ends for end in pair[which]]) for which in (0, 1)]
    return (
        dataclasses.replace(side(examples, "student", heads[0]), byte_ends=flat[0]),
        dataclasses.replace(side(examples, "teacher", heads[1]), byte_ends=flat[1]),
    )


def random_batch(seed):
    """Return ragged examples whose tokens have 0 to 3 bytes.

    The last two tokens of each example end at the same byte on both sides.
    """
    generator = torch.Generator().manual_seed(seed)
    ends, lengths = [], []
    for _ in range(4):
        both = []
        for size in torch.randint(2, 9, (2,), generator=generator).tolist():
            both.append(torch.randint(0, 4, (size,), generator=generator).cumsum(0).clamp_max(9).tolist())
            both[-1] += [10, 10]
        ends.append(tuple(both))
        lengths.append(tuple(map(len, both)))
    return random_examples(lengths, seed=seed), random_heads(seed=seed), ends


def twin_batch(*, steps=5):
    """Return the sides and the pair of two identical models."""
    torch.manual_seed(0)
    weight = torch.randn(20, 8, dtype=torch.float64)
    tokens = (*(bytes([97 + index]) for index in range(19)), None)
    pair = ModelPair(Widths(8, 8, 8, 8), tokens, tokens, OutputHead(weight), OutputHead(weight), (19, 19))
    examples = random_examples([(steps, steps), (2, 2)], widths=Widths(8, 8, 8, 8), vocabularies=(20, 20))
    for example in examples:
        for key in ("hidden", "in", "out", "target"):
            example[f"teacher_{key}"] = example[f"student_{key}"].clone()
    return side(examples, "student", weight), side(examples, "teacher", weight), pair


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches_equal_the_literal_reference(seed):
    """Terms and gradients of the student's states, head and t2s equal the literal implementation."""
    examples, heads, ends = random_batch(seed)
    loss = DskdV2Loss(pair=pair_of(heads), kd_rate=0.3)
    leaves = [e["student_hidden"].requires_grad_() for e in examples]
    head = heads[0].clone().requires_grad_()
    student, teacher = sided(examples, (head, heads[1]), ends)
    output = loss(student, teacher)
    t2s = loss.projectors.t2s.weight
    expected = reference_v2.exact_token_kd(examples, ends, head, heads[1], pair_of(heads), t2s=t2s)
    for name in NAMES:
        torch.testing.assert_close(output.terms[name], torch.as_tensor(expected[name]).detach(), msg=name)
    assert output.terms["t2s_ce"] > 0
    assert output.terms["kd_teacher"] > 0
    total = 0.7 * expected["ce"] + 0.3 * (expected["t2s_ce"] + expected["kd_student"] + expected["kd_teacher"])
    torch.testing.assert_close(output.loss, total)
    gradients = [torch.autograd.grad(value, [head, t2s, *leaves]) for value in (output.loss, total)]
    for ours, literal in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, literal)


def test_untrained_projectors_are_the_pseudo_inverse():
    """With untrained projectors, the terms equal those of a literal implementation that computes its own pseudo-inverse."""
    examples, heads, ends = random_batch(0)
    output = DskdV2Loss(pair=pair_of(heads))(*sided(examples, heads, ends))
    expected = reference_v2.exact_token_kd(examples, ends, *heads, pair_of(heads))
    for name in NAMES:
        torch.testing.assert_close(output.terms[name], torch.as_tensor(expected[name]), msg=name)


def test_random_batches_need_the_agreement_mask():
    """The random batches contain tokens at which the predictions agree and others, so that the tests above check the mask."""
    seen = set()
    for seed in range(6):
        examples, heads, ends = random_batch(seed)
        values = [
            DskdV2Loss(pair=pair_of(heads), agreement_mask=mask)(*sided(examples, heads, ends)).terms["kd_student"]
            for mask in (True, False)
        ]
        assert values[1] > 0
        seen |= {"none"} if values[0] == 0 else {"some"} if values[0] != values[1] else {"all"}
    assert "some" in seen


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_have_nothing_to_learn(divergence):
    """For identical models, the maps are the identity and both divergences are 0."""
    student, teacher, pair = twin_batch()
    loss = DskdV2Loss(pair=pair, divergence=divergence)
    terms = loss(student, teacher).terms
    assert terms["kd_student"].item() == pytest.approx(0, abs=1e-12)
    assert terms["kd_teacher"].item() == pytest.approx(0, abs=1e-12)
    logits = teacher.head.logits(teacher.hidden)
    torch.testing.assert_close(terms["t2s_ce"], -logits.log_softmax(-1).amax(-1).mean())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_in_both_spaces(divergence):
    """The divergence is used in the student's and in the teacher's space."""
    student, teacher, pair = twin_batch()
    student = dataclasses.replace(student, hidden=student.hidden.roll(1, 0).requires_grad_())
    loss = DskdV2Loss(pair=pair, divergence=divergence, agreement_mask=False)
    output = loss(student, teacher)
    target, learned = ((s.head.logits(s.hidden) / 2).log_softmax(-1) for s in (teacher, student))
    values = loss.divergence(target, learned)
    for name in ("kd_student", "kd_teacher"):
        torch.testing.assert_close(output.terms[name], values.mean().detach())
    ce = torch.nn.functional.cross_entropy(student.head.logits(student.hidden), student.target_ids)
    expected = torch.autograd.grad(0.5 * ce + values.mean(), student.hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, student.hidden)[0], expected)


def test_prediction_without_a_token_of_the_students_drops_out():
    """Tokens are left out if the student's vocabulary lacks the teacher's prediction.

    The published code uses the unknown token.
    """
    student, teacher, pair = twin_batch()
    predicted = teacher.head.logits(teacher.hidden).argmax(-1)
    tokens = list(pair.teacher_tokens)
    tokens[int(predicted[0])] = b"no such token"
    loss = DskdV2Loss(pair=dataclasses.replace(pair, teacher_tokens=tuple(tokens)))
    with torch.no_grad():
        loss.projectors.t2s.weight.copy_(torch.eye(8))
    kept = predicted != predicted[0]
    values = -teacher.head.logits(teacher.hidden).log_softmax(-1).amax(-1)
    parts = [(values[rows] * kept[rows]).sum() / kept[rows].sum() for rows in (slice(0, 5), slice(5, 7))]
    expected = (5 * parts[0] + 2 * parts[1]) / 7
    torch.testing.assert_close(loss(student, teacher).terms["t2s_ce"], expected)


def test_end_of_the_text_is_a_label():
    """The end token is a valid label if the teacher predicts it, although it has no bytes."""
    student, teacher, pair = twin_batch()
    hidden = teacher.hidden.clone()
    hidden[4] = 5 * pair.teacher_head.weight[19]
    teacher = dataclasses.replace(teacher, hidden=hidden)
    pair = dataclasses.replace(pair, student_tokens=(*pair.student_tokens, b"more"))
    loss = DskdV2Loss(pair=pair)
    without = DskdV2Loss(pair=dataclasses.replace(pair, end_tokens=None))
    without.load_state_dict(loss.state_dict())
    values = -teacher.head.logits(hidden).log_softmax(-1).amax(-1)
    torch.testing.assert_close(loss(student, teacher).terms["t2s_ce"], values.mean())
    assert without(student, teacher).terms["t2s_ce"] > loss(student, teacher).terms["t2s_ce"]


def test_no_aligned_token_leaves_the_cross_entropy():
    """If no token is aligned, the distillation terms are 0 and the gradient is finite."""
    student, teacher, pair = twin_batch()
    student = dataclasses.replace(student, byte_ends=100 + student.byte_ends, hidden=student.hidden.requires_grad_())
    output = DskdV2Loss(pair=pair)(student, teacher)
    assert [output.terms[name].item() for name in NAMES[1:]] == [0, 0, 0]
    output.loss.backward()
    assert torch.isfinite(student.hidden.grad).all()


def test_needs_a_teacher():
    """A missing teacher raises a ValueError that names the method."""
    student, _, pair = twin_batch()
    with pytest.raises(ValueError, match="DskdV2Loss needs a teacher"):
        DskdV2Loss(pair=pair)(student)
