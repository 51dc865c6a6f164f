"""Test the projectors that are initialised from the two heads."""

import dataclasses

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.losses import ModelPair, Widths
from dwakd.losses.head_maps import HeadMaps, pseudo_inverse, shared_teacher_ids, student_tokens
from tests.losses.builders import pair_of, random_heads

WIDE = Widths(6, 8, 6, 8)


def heads(vocabularies=(40, 43), **options):
    """Return a pair whose shared tokens give full column rank. `options` are fields of the heads."""
    weights = random_heads(vocabularies=vocabularies)
    pair = pair_of(weights)
    return dataclasses.replace(
        pair,
        student_head=OutputHead(weights[0], **options.get("student", {})),
        teacher_head=OutputHead(weights[1], **options.get("teacher", {})),
    )


def test_start_is_least_squares():
    """The initial maps are the least-squares solutions that preserve the logits of shared tokens."""
    pair = heads()
    maps, table = HeadMaps(pair), student_tokens(pair)
    teacher_ids = shared_teacher_ids(pair, table)
    s_rows, t_rows = pair.student_head.weight[table[teacher_ids]], pair.teacher_head.weight[teacher_ids]
    hidden = torch.randn(7, 8, dtype=torch.float64)
    expected = torch.linalg.lstsq(s_rows, t_rows @ hidden.T).solution.T
    torch.testing.assert_close(maps.t2s(hidden), expected)
    assert maps.t2s.bias is None
    student_hidden = torch.randn(7, 6, dtype=torch.float64)
    expected = torch.linalg.lstsq(t_rows, s_rows @ student_hidden.T).solution.T
    torch.testing.assert_close(maps.s2t(student_hidden, pair.student_head, pair.teacher_head), expected)


@pytest.mark.parametrize("count", [3, 8, 50])
def test_pseudo_inverse_of_any_rank(count):
    """The pseudo-inverse equals that of torch for matrices without full rank, too."""
    torch.manual_seed(0)
    rows = torch.randn(count, 8, dtype=torch.float64)
    rows[:, 7] = rows[:, 6]
    torch.testing.assert_close(pseudo_inverse(rows).T, torch.linalg.pinv(rows))
    torch.testing.assert_close(pseudo_inverse(rows.float()).T, torch.linalg.pinv(rows).float(), atol=1e-5, rtol=1e-4)


def test_one_head_gives_the_identity():
    """If both models have the same head, both maps are the identity."""
    weight = torch.randn(40, 8, dtype=torch.float64)
    tokens = (*(bytes([97 + index]) for index in range(39)), None)
    pair = ModelPair(Widths(8, 8, 8, 8), tokens, tokens, OutputHead(weight), OutputHead(weight), (39, 39))
    maps, identity = HeadMaps(pair), torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(maps.t2s.weight.detach(), identity)
    torch.testing.assert_close(maps.s2t(identity, pair.student_head, pair.teacher_head), identity)


def test_biases_and_scales_belong_to_the_logits():
    """The maps preserve logits that include the biases and scales of the heads."""
    torch.manual_seed(0)
    bias = torch.randn(40, dtype=torch.float64)
    pair = heads(
        (40, 40),
        student={"bias": bias, "scale": 0.25},
    )
    weight = torch.randn(8, 6, dtype=torch.float64)
    table = student_tokens(pair)
    teacher_ids = shared_teacher_ids(pair, table)
    # make the teacher's shared logits a linear function of the student's, so that the fit is exact
    rows = pair.teacher_head.weight.clone()
    rows[teacher_ids] = pair.student_head.weight[table[teacher_ids]] @ weight.T * 0.25 / 3.0
    offsets = torch.randn(40, dtype=torch.float64)
    offsets[teacher_ids] = bias[table[teacher_ids]] * 0.25 / 3.0
    pair = dataclasses.replace(pair, teacher_head=OutputHead(rows, bias=offsets, scale=3.0))
    maps, hidden = HeadMaps(pair), torch.randn(5, 8, dtype=torch.float64)
    ours = pair.student_head.logits(maps.t2s(hidden))[:, table[teacher_ids]]
    torch.testing.assert_close(ours, pair.teacher_head.logits(hidden)[:, teacher_ids])
    back = maps.s2t(maps.t2s(hidden), pair.student_head, pair.teacher_head)
    kept = pair.teacher_head.logits(back)[:, teacher_ids]
    torch.testing.assert_close(kept, pair.teacher_head.logits(hidden)[:, teacher_ids])


def test_s2t_follows_the_students_head_without_gradient_to_it():
    """s2t is recomputed from the student's current head, which gets no gradient through it."""
    pair = heads()
    maps = HeadMaps(pair)
    head = OutputHead((2 * pair.student_head.weight).requires_grad_())
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    moved = maps.s2t(hidden, head, pair.teacher_head)
    torch.testing.assert_close(moved, 2 * maps.s2t(hidden, pair.student_head, pair.teacher_head))
    moved.sum().backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0
    assert [name for name, _ in maps.named_parameters()] == ["t2s.weight"]
    assert list(maps.state_dict()) == ["t2s.weight"]


def test_s2t_of_a_frozen_head_is_kept_and_of_a_trained_one_never():
    """s2t is cached while the head is frozen and unchanged, and recomputed at each call if the head is trained."""
    pair, hidden = heads(), torch.randn(4, 6, dtype=torch.float64)
    maps, head = HeadMaps(pair), OutputHead(pair.student_head.weight.clone())
    first = maps.s2t(hidden, head, pair.teacher_head)
    inverse = maps.teacher_inverse.clone()
    maps.teacher_inverse.zero_()
    torch.testing.assert_close(maps.s2t(hidden, head, pair.teacher_head), first)
    maps.teacher_inverse.copy_(inverse)
    head.weight.mul_(2)
    torch.testing.assert_close(maps.s2t(hidden, head, pair.teacher_head), 2 * first)
    torch.testing.assert_close(maps.s2t(hidden, OutputHead(head.weight / 2), pair.teacher_head), first)
    head.weight.requires_grad_()
    torch.testing.assert_close(maps.s2t(hidden, head, pair.teacher_head), 2 * first)
    head.weight.data.mul_(2)
    torch.testing.assert_close(maps.s2t(hidden, head, pair.teacher_head), 4 * first)


def test_tokens_are_shared_by_their_bytes():
    """Tokens with equal bytes and the end tokens are shared; special tokens and padding of the heads are not."""
    student = (None, b"A", b" a", b"A", b"\n", None)
    teacher = (b"\n", b" a", b"a", b"A", b"", None, None)
    weights = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    pair = ModelPair(Widths(4, 5, 4, 5), student, teacher, *map(OutputHead, weights), (5, 6))
    table = student_tokens(pair)
    assert table.tolist() == [4, 2, -1, 3, -1, -1, 5, -1, -1]
    assert shared_teacher_ids(pair, table).tolist() == [0, 1, 3, 6]


def test_one_vocabulary_is_shared_whole():
    """With one vocabulary, all tokens are shared, special tokens included, but not the padding of the heads."""
    tokens = (None, b"A", b" a", b"A", None)
    weights = torch.randn(6, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    pair = ModelPair(Widths(4, 5, 4, 5), tokens, tokens, *map(OutputHead, weights), (4, 4))
    assert student_tokens(pair).tolist() == [0, 1, 2, 3, 4, -1, -1]


def test_forbidden_tokens_are_not_shared():
    """Tokens with a bias of -inf are not shared. They would make the maps NaN."""
    bias = torch.zeros(40, dtype=torch.float64)
    bias[3] = -torch.inf
    pair = heads((40, 43), student={"bias": bias})
    table = student_tokens(pair)
    assert 3 not in table.tolist()
    assert torch.isfinite(HeadMaps(pair).t2s.weight).all()
    bias = torch.zeros(43, dtype=torch.float64)
    bias[5] = -torch.inf
    forbidding = dataclasses.replace(pair, teacher_head=OutputHead(pair.teacher_head.weight, bias))
    assert 5 not in shared_teacher_ids(forbidding, table).tolist()
    assert torch.isfinite(HeadMaps(forbidding).t2s.bias).all()


def test_nothing_shared_is_named():
    """Vocabularies without a shared token raise a ValueError."""
    pair = dataclasses.replace(pair_of(random_heads()), teacher_tokens=(b"?",) * 13, end_tokens=None)
    with pytest.raises(ValueError, match="share no token"):
        HeadMaps(pair)


def test_half_precision_heads_are_fitted_in_float32():
    """The maps of bfloat16 heads are computed in float32 and stay close to those in float64."""
    pair = heads()
    low = dataclasses.replace(
        pair,
        student_head=OutputHead(pair.student_head.weight.bfloat16()),
        teacher_head=OutputHead(pair.teacher_head.weight.bfloat16()),
    )
    maps = HeadMaps(low)
    assert maps.t2s.weight.dtype == torch.float32
    torch.testing.assert_close(maps.t2s.weight.double(), HeadMaps(pair).t2s.weight, atol=0.05, rtol=0.05)
