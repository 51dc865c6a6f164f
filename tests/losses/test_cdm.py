"""Test CDM: warping weights, groups, candidates and loss, against a literal implementation of the paper."""

import dataclasses
import math
import sys
from functools import partial

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from dwakd.align.vocab import exact_overlap, token_text
from dwakd.batch import OutputHead
from dwakd.data.encoding import TextEncoder
from dwakd.kernels.head_loss import head_loss
from dwakd.losses import CdmLoss, ModelPair, Widths
from dwakd.losses.dynamic_mapping import top_tokens, warp, warping_weights
from tests.builders import SAMPLE_TEXTS, bpe_byte_fallback, byte_bpe
from tests.losses.builders import WIDTHS, random_examples, random_heads, side, smallest_pair
from tests.losses.test_min_ed import kl, logit_side, pair

SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]


def weight(entropy, entropies):
    low, high = min(entropies), max(entropies)
    share = (entropy - low) / (high - low) if high > low else 0.0
    return math.floor(3 / (1 + math.exp(2 - 4 * share)) + 3)


def path_groups(texts, weights):
    """Compute the groups of positions from the full table of path costs, traced back from the last cell."""
    total = {(-1, -1): 0.0}

    def ways(i, j):
        return sorted(((i - 1, j - 1), (i, j - 1), (i - 1, j)), key=lambda cell: total.get(cell, math.inf))

    for i, (own, f_s) in enumerate(zip(texts[0], weights[0], strict=True)):
        for j, (other, f_t) in enumerate(zip(texts[1], weights[1], strict=True)):
            total[i, j] = Levenshtein.distance(own, other) * f_s * f_t + total.get(ways(i, j)[0], math.inf)
    cell, groups = (len(texts[0]) - 1, len(texts[1]) - 1), []
    start = cell
    while start != (-1, -1):
        before = ways(*cell)[0]
        if before == (cell[0] - 1, cell[1] - 1):
            groups.append([list(range(cell[n], start[n] + 1)) for n in range(2)])
            start = before
        cell = before
    return groups[::-1]


def nearest(text, candidates, threshold):
    best, found = threshold, None
    for token, other in candidates:
        ratio = Levenshtein.distance(text, other) / max(len(text) + len(other), 1)
        if ratio < best:
            best, found = ratio, token
    return found


def matched_pairs(tops, twins, texts, threshold):
    """Return pairs (student token, teacher token): first those of the teacher's candidates, then those of the student's."""
    alone = [
        [(token, text[token]) for token in top if token not in twin and token < len(text) and text[token] is not None]
        for top, twin, text in zip(tops, twins, texts, strict=True)
    ]
    pairs = []
    for n in (1, 0):
        for token in tops[n]:
            other = twins[n].get(token)
            if token in dict(alone[n]):
                other = nearest(texts[n][token], alone[1 - n], threshold)
            found = (other, token) if n else (token, other)
            if other is not None and found not in pairs:
                pairs.append(found)
    return pairs


def twin_kd(models, logits, targets, top_k, threshold, tau):
    """Compute the KL term of one example: the mean over its groups, times its number of student tokens."""
    vocabularies = models.student_tokens, models.teacher_tokens
    matched = [ids.tolist() for ids in exact_overlap(*vocabularies, models.end_tokens)]
    twins = [dict(zip(*matched, strict=True)), dict(zip(*matched[::-1], strict=True))]
    texts = [[None if x is None else token_text(x).replace(" ", "") for x in tokens] for tokens in vocabularies]
    before = [[text[token] for token in ids[:-1]] for ids, text in zip(targets, texts, strict=True)]
    read = [["\0", *("\0" if text is None else text for text in row)] for row in before]
    entropies = [(-rows.log_softmax(-1) * rows.softmax(-1)).sum(-1).tolist() for rows in logits]
    groups = path_groups(read, [[weight(value, values) for value in values] for values in entropies])
    values = []
    for group in groups:
        s, t = (rows[members].mean(0) for rows, members in zip(logits, group, strict=True))
        tops = [row.topk(top_k).indices.tolist() for row in (s, t)]
        own, other = (torch.tensor(ids) for ids in zip(*matched_pairs(tops, twins, texts, threshold), strict=True))
        values.append(kl((t[other] / tau).softmax(-1), (s[own] / tau).log_softmax(-1)))
    return torch.stack(values).sum() * len(logits[0]) / len(groups)


def tokenized(soft_cap):
    """Return random states for the tokens of real texts, and padded heads for the vocabularies of two tokenizers."""
    encoders = [TextEncoder(build(), "plain") for build in (byte_bpe, bpe_byte_fallback)]
    vocabularies = [tuple(encoder.token_bytes()) for encoder in encoders]
    ids = [
        [[*e.tokenizer(text, add_special_tokens=False).input_ids, e.end_token_id] for e in encoders]
        for text in SAMPLE_TEXTS
    ]
    sizes = len(vocabularies[0]) + 3, len(vocabularies[1]) + 5
    examples = random_examples([tuple(map(len, row)) for row in ids], vocabularies=sizes)
    for example, row in zip(examples, ids, strict=True):
        example["student_target"], example["teacher_target"] = map(torch.tensor, row)
    heads = [OutputHead(head.requires_grad_(), soft_cap=soft_cap) for head in random_heads(vocabularies=sizes)]
    sides = [
        dataclasses.replace(side(examples, name, head.weight), head=head)
        for name, head in zip(("student", "teacher"), heads, strict=True)
    ]
    return ModelPair(WIDTHS, *vocabularies, *heads, tuple(encoder.end_token_id for encoder in encoders)), sides


def test_weights_of_the_specification():
    """The warping weights equal those of the specification.

    Each example is scaled by itself, and equal entropies give the lowest weight.
    """
    values = torch.tensor([*SHARES, *(3 + 2 * share for share in SHARES), 7.0, 7.0, 0.0])
    f = warping_weights(values, torch.tensor([5, 5, 2, 1])).tolist()
    assert f == [3, 3, 4, 5, 5] * 2 + [3] * 3
    before = [3 * torch.tensor(4 * share - 2).sigmoid().item() + 3 for share in SHARES]
    assert before == pytest.approx([3.357609, 3.806824, 4.5, 5.193176, 5.642391], abs=1e-6)


def test_rows_read_the_token_before_theirs_in_their_own_example():
    """The text of a position is the token before it in the same example, without spaces."""
    two = dataclasses.replace(logit_side(torch.randn(5, 4), [1, 0, 3, 2, 1]), lengths=torch.tensor([2, 3]))
    one = logit_side(torch.randn(1, 1), [0])
    models = pair((b" cat", b"s", None, b" "), (b"x",), (4, 1), None)
    assert CdmLoss(pair=models).token_map.read_texts([two, one])[0] == ["\0", "s", "\0", "", "\0"]


def test_mismatched_rows_of_high_entropy_cost_more():
    """Pairing "ab" with "abc" costs more where the entropy is high, which changes the cheapest path."""
    texts = [["\0", "cd", "ab", "ab"], ["\0", "abc", "ab"]]

    def sizes(*entropy):
        groups, shares = warp([torch.tensor(entropy), torch.zeros(3)], texts, [torch.tensor([4]), torch.tensor([3])])
        assert shares.tolist() == pytest.approx([4 / 3] * 3)
        return [size.tolist() for size in groups]

    assert sizes(0.0, 0.0, 0.0, 0.0) == [[2, 1, 1], [1, 1, 1]]
    assert sizes(0.0, 0.0, 1.0, 0.0) == [[1, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize(("top_k", "soft_cap", "budget"), [(7, None, 1), (7, 2.0, 600_000), (60, None, 2**27)])
def test_two_tokenizers_give_the_loss_and_gradient_of_the_reference(monkeypatch, top_k, soft_cap, budget):
    """Terms and gradients equal those of the literal implementation, for several examples, padded heads and soft caps."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    models, (student, teacher) = tokenized(soft_cap)
    leaves = student.hidden.requires_grad_(), student.head.weight
    output = CdmLoss(pair=models, top_k=top_k, kd_weight=0.7, ce_weight=0.2)(student, teacher)
    examples = [
        zip(torch.split(s, student.lengths.tolist()), torch.split(t, teacher.lengths.tolist()), strict=True)
        for s, t in (
            (student.head.logits(student.hidden), teacher.head.logits(teacher.hidden).detach()),
            (student.target_ids, teacher.target_ids),
        )
    ]
    kd = sum(twin_kd(models, *example, top_k, 0.3, 0.8) for example in zip(*examples, strict=True)) / len(leaves[0])
    ce = torch.nn.functional.cross_entropy(student.head.logits(student.hidden), student.target_ids)
    assert output.terms["kd"].item() == pytest.approx(kd.item(), rel=1e-9)
    assert output.terms["ce"].item() == pytest.approx(ce.item(), rel=1e-9)
    got, expected = (torch.autograd.grad(loss, leaves) for loss in (output.loss, 0.2 * ce + 0.7 * kd))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_one_tokenizer_is_kl_over_the_union_of_candidates(monkeypatch, impl):
    """With one tokenizer, the loss is the KL over the union of both candidate sets at each position."""
    monkeypatch.setattr(sys.modules["dwakd.losses.cdm"], "head_loss", partial(head_loss, impl=impl))
    generator = torch.Generator().manual_seed(1)
    own, theirs = (torch.randn(4, 203, generator=generator).double() * 2 for _ in range(2))
    own[:, 0] += 9
    tokens = tuple(f"t{index}".encode() for index in range(203))
    targets = [5, 5, 8, 0]
    student, teacher = logit_side(own.requires_grad_(), targets), logit_side(theirs, targets)
    output = CdmLoss(pair=pair(tokens, tokens, (203, 203), None), top_k=10)(student, teacher)
    expected = []
    for s, t in zip(own, theirs, strict=True):
        union = sorted({*s.topk(10).indices.tolist(), *t.topk(10).indices.tolist()})
        assert 0 in union
        expected.append(kl((t[union] / 0.8).softmax(-1), (s[union] / 0.8).log_softmax(-1)))
    total = 0.9 * torch.nn.functional.cross_entropy(own, student.target_ids) + 0.1 * torch.stack(expected).mean()
    torch.testing.assert_close(output.loss, total)
    torch.testing.assert_close(*(torch.autograd.grad(loss, own)[0] for loss in (output.loss, total)))


def test_the_smallest_loss_is_where_the_models_agree():
    """If student and teacher have equal logits, loss and gradient are 0."""
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).double()
    tokens = tuple(f"t{index}".encode() for index in range(6))
    student, teacher = logit_side(rows.clone().requires_grad_(), [1, 2, 3]), logit_side(rows, [1, 2, 3])
    output = CdmLoss(pair=pair(tokens, tokens, (6, 6), None), ce_weight=0.0)(student, teacher)
    output.loss.backward()
    assert output.terms["kd"].item() == pytest.approx(0.0, abs=1e-12)
    assert student.hidden.grad.abs().max() < 1e-12


def test_groups_without_a_match_have_no_gradient():
    """If no candidate has a counterpart, loss and gradient are 0. Special tokens match nothing but end tokens."""
    generator = torch.Generator().manual_seed(3)
    own, theirs = (torch.randn(3, 3, generator=generator) for _ in range(2))
    vocabularies = (b"abcd", b"efgh", None), (b"ijkl", b"mnop", None)
    student, teacher = logit_side(own.requires_grad_(), [0, 1, 0]), logit_side(theirs, [1, 1, 0])
    output = CdmLoss(pair=pair(*vocabularies, (3, 3), None), ce_weight=0.0)(student, teacher)
    output.loss.backward()
    assert output.loss == 0
    assert (own.grad == 0).all()
    assert CdmLoss(pair=pair(*vocabularies, (3, 3), (2, 2))).token_map.student_of.tolist() == [-1, -1, 2]


@pytest.mark.parametrize(("vocabulary", "count"), [(20, 7), (160, 9), (163, 9), (175, 10)])
def test_blocks_hold_the_largest_logits(vocabulary, count):
    """The largest logits are found for vocabularies of any size, also in an incomplete last block."""
    columns = torch.randn(vocabulary, 6, generator=torch.Generator().manual_seed(vocabulary))
    columns[-2, 3] = 50.0
    assert torch.equal(top_tokens(columns, count), columns.t().topk(count).indices)


def test_the_smallest_pair_checks_options():
    """Options are validated with a vocabulary of one token, before any model is loaded."""
    CdmLoss(pair=smallest_pair())
    head = OutputHead(torch.eye(2))
    CdmLoss(pair=ModelPair(Widths(2, 2, 2, 2), (b"a", b"b"), (b"c",), head, head))
    with pytest.raises(ValueError, match="threshold must be at most 1"):
        CdmLoss(pair=smallest_pair(), threshold=2.0)
