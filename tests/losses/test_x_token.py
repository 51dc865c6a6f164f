"""Test X-Token: the projection matrix, and both losses against plain loops over dense probabilities."""

import dataclasses
import math
import sys

import pytest
import torch

from dwakd.align.projection import projection
from dwakd.align.vocab import exact_overlap
from dwakd.data.encoding import TextEncoder
from dwakd.folders import CACHE_VARIABLE
from dwakd.losses import XTokenLoss
from tests.builders import SAMPLE_TEXTS, bpe_byte_fallback, byte_bpe
from tests.losses.test_min_ed import grouped_sides, pair

STUDENT, TEACHER = (b"201", b"a", b"ab", b"20", None, b"b2"), (b"2", b"0", b"1", b"a", b"b", None, b"aba")
GROUPS = [([0, 1], [0, 1]), ([2], [2, 3]), ([3], [4])]
TWO, THREE = (10 / 11, 1 / 11), (100 / 111, 10 / 111, 1 / 111)
# 201 -> 2 0 1, a -> a, ab -> a b and aba -> ab a, 20 -> 2 0, end -> end, b2 -> b 2
W = torch.zeros(6, 7, dtype=torch.float64)
W[0, [0, 1, 2]] = torch.tensor(THREE, dtype=torch.float64)
W[1, 3] = W[4, 5] = 1
W[2, [3, 4, 6]] = torch.tensor([10.0, 1, 10], dtype=torch.float64) / 21
W[3, [0, 1]] = W[5, [4, 0]] = torch.tensor(TWO, dtype=torch.float64)
# in H-KL: a, b2 and end; of 201 and 20, which both begin with 2, the one with the larger weight; ab has two equal ones
COMMON = [(1, 3), (3, 0), (4, 5), (5, 4)]


def models(**changes):
    return pair(STUDENT, TEACHER, (6, 7), (4, 5), **changes)


@pytest.fixture
def sides():
    return grouped_sides(6, 7, [2, 0, 1, 4], [3, 1, 2, 0, 5])


def p_kl(student, teacher, tau: float, k: int):
    """Compute the KL of each group by loops over groups, tokens and the entries of the matrix."""
    kept = teacher.hidden.amax(0).argsort(descending=True)[:k].tolist()
    probs, values = (student.hidden / tau).softmax(-1), []
    log_target = (teacher.hidden[:, kept] / tau).log_softmax(-1)
    for own, theirs in GROUPS:
        q = [sum(W[s, t] * probs[i, s] for i in own for s in range(6)) / len(own) for t in kept]
        log_t = [sum(log_target[j, n] for j in theirs) / len(theirs) for n in range(len(kept))]
        total = sum(q) + 1e-10
        values.append(sum(x.exp() * (x - (y / total + 1e-10).log()) for x, y in zip(log_t, q, strict=True)))
    return tau**2 * torch.stack(values).mean()


def h_kl(student, teacher, tau: float, ranks: int):
    """Compute the KL over matched tokens and the difference of the sorted others by loops."""
    logs = [(side.hidden / tau).log_softmax(-1) for side in (student, teacher)]
    kd = uncommon = 0
    for group in GROUPS:
        s, t = (log[rows].mean(0) for log, rows in zip(logs, group, strict=True))
        kd += sum(t[j].exp() * (t[j] - s[i]) for i, j in COMMON)
        own = sorted((s[i].exp() for i in range(6) if i not in [a for a, _ in COMMON]), reverse=True)
        theirs = sorted((t[j].exp() for j in range(7) if j not in [b for _, b in COMMON]), reverse=True)
        uncommon += sum(abs(a - b) for a, b in list(zip(own, theirs, strict=False))[:ranks])
    return tau**2 * kd / len(GROUPS), tau**2 * uncommon / len(GROUPS)


def test_rows_of_the_matrix():
    """Numbers that the teacher writes digit by digit would get no supervision if their row were empty."""
    loss = XTokenLoss(pair=models())
    dense = torch.zeros(6, 7, dtype=torch.float64)
    for ids, weights in zip(loss.targets.t(), loss.weights.t(), strict=True):
        dense[torch.arange(6), ids] += weights.double()
    torch.testing.assert_close(dense, W, rtol=0, atol=1e-7)
    assert loss.common.t().tolist() == [list(one) for one in COMMON]
    two = XTokenLoss(pair=models(), top_k=2)
    assert two.targets[2].tolist() == [3, 6]
    assert two.weights[2].tolist() == [0.5, 0.5]


def test_the_matrix_is_stored(monkeypatch, tmp_path):
    """The matrix of large vocabularies is read again only if the tokenizers and the number of entries are the same."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("dwakd.align.vocab._PAIRS_WORTH_KEEPING", 1)
    calls = []

    def spell(tokens):
        calls.append(tokens)
        return [[] for _ in tokens]

    for top_k, digest, count in ((4, "a", 2), (4, "a", 2), (3, "a", 4), (4, "b", 6), (4, "", 8), (4, "", 10)):
        loss = XTokenLoss(pair=dataclasses.replace(models(), spell=(spell, spell), spelling=digest), top_k=top_k)
        assert len(calls) == count
        dense = torch.zeros(6, 7).index_put_((torch.arange(6)[:, None], loss.targets), loss.weights, accumulate=True)
        torch.testing.assert_close(dense, W.float())


@pytest.mark.parametrize("budget", [1, 2**27])
@pytest.mark.parametrize(("tau", "k"), [(1.0, 8192), (2.0, 4)])
def test_p_kl_is_that_of_the_formula(monkeypatch, sides, tau, k, budget):
    """Loss and gradient are those of the published equations, also with a part of the teacher's vocabulary."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    loss = XTokenLoss(pair=models(), temperature=tau, vocab_topk=k, ce_weight=0.25, kd_weight=2.0).double()
    compare(loss, sides, {"kd": p_kl(*sides, tau, k)})


@pytest.mark.parametrize(("tau", "ranks"), [(1.0, 8192), (2.0, 1)])
def test_h_kl_is_that_of_the_formula(sides, tau, ranks):
    """Loss and gradient are those of the published equations, with relaxed matches."""
    options = {"objective": "h_kl", "temperature": tau, "uncommon_topk": ranks, "ce_weight": 0.25, "kd_weight": 2.0}
    kd, uncommon = h_kl(*sides, tau, ranks)
    compare(XTokenLoss(pair=models(), **options).double(), sides, {"kd": kd, "uncommon": uncommon})


def compare(loss, sides, expected):
    output, hidden = loss(*sides), sides[0].hidden
    ce = torch.nn.functional.cross_entropy(hidden, sides[0].target_ids)
    for name, value in {"ce": ce, **expected}.items():
        assert output.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
    total = 0.25 * ce + 2 * sum(expected.values())
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(value, hidden)[0] for value in (output.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_tokens_are_split_as_the_other_tokenizer_splits_them():
    """Pieces that the teacher never produces would get the student's probability."""
    student, teacher = (TextEncoder(tokenizer, "plain") for tokenizer in (byte_bpe(), bpe_byte_fallback()))
    tokens = student.token_bytes(), teacher.token_bytes()
    matched = exact_overlap(*tokens, (student.end_token_id, teacher.end_token_id))
    ids, weights = projection(*tokens, matched, 4, (student.spell, teacher.spell))
    assert weights.sum(1)[[token is not None for token in tokens[0]]].allclose(torch.ones(()))
    words = [
        (i, token.decode()[1:])
        for i, token in enumerate(tokens[0])
        if token and i not in matched[0] and token[:1] == b" " and token[1:].isalpha()
    ]
    assert len(words) > 5
    for index, word in words:
        pieces = teacher.tokenizer(word, add_special_tokens=False)["input_ids"][:4]  # this tokenizer adds the space
        assert set(pieces) <= set(ids[index][weights[index] > 0].tolist())
        assert pieces[0] in ids[index][weights[index] == weights[index].max()]


def test_spelling_of_a_token_is_exact():
    """A space that the tokenizer adds, or a replacement character, would map a token to other text."""
    encoder = TextEncoder(bpe_byte_fallback(SAMPLE_TEXTS), "plain")
    tokens = [b" lazy", b"lazy", "é".encode()[:1], b" \xe4\xbd", "你".encode()]
    known = encoder.token_bytes()
    for token, ids in zip(tokens, encoder.spell(tokens), strict=True):
        assert b"".join(known[i] or b"?" for i in ids) in (token, b"")
    assert encoder.spell([b" lazy"])[0]
    assert not any(encoder.spell(tokens[1:3]))


def test_a_teacher_token_without_a_counterpart_has_a_finite_loss(sides):
    """The KL would be infinite where no student token is mapped to a token that the teacher predicts."""
    student, teacher = sides
    tokens = (*TEACHER[:6], b"zz")
    logits = teacher.hidden.clone()
    logits[:, 6] = 20.0
    output = XTokenLoss(pair=pair(STUDENT, tokens, (6, 7), (4, 5)))(
        student, dataclasses.replace(teacher, hidden=logits)
    )
    assert output.terms["kd"].item() == pytest.approx(-math.log(1e-10), rel=0.01)
    assert torch.autograd.grad(output.loss, student.hidden)[0].isfinite().all()
