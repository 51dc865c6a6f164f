"""Test that heads which forbid tokens by a bias of -inf give the same loss as heads without these tokens."""

import dataclasses
import math
from functools import partial

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.kernels import head_loss
from dwakd.losses import METHODS, GoldLoss, KdLoss, ModelPair, build_loss, method_options
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side, use_kernels
from tests.losses.test_contract import ALL, LENGTHS

FORBIDDEN = ([2, 5], [1, 4, 7])
"""Forbidden tokens of the student and of the teacher."""


def run_forbidding(name, options, dtype, *, removed):
    """Return terms and gradients for heads that forbid tokens or, if `removed`, do not contain them."""
    same = method_options(name, options).needs_same_vocabulary
    sizes, forbidden = ((11, 11), (FORBIDDEN[0],) * 2) if same else ((11, 13), FORBIDDEN)
    weights = [weight.to(dtype) for weight in random_heads(vocabularies=sizes)]
    kept = [[i for i in range(size) if i not in ids] for size, ids in zip(sizes, forbidden, strict=True)]
    tokens, heads = [], []
    for weight, ids, own, spelled in zip(weights, forbidden, kept, (b"abcdefghij", b"defghijklmno"), strict=True):
        letters = [*(bytes([letter]) for letter in spelled[: len(weight) - 1]), None]
        bias = torch.zeros(len(weight), dtype=dtype).index_fill(0, torch.tensor(ids), -math.inf)
        heads.append(OutputHead(weight[own]) if removed else OutputHead(weight, bias))
        tokens.append(tuple(letters[i] for i in own) if removed else tuple(letters))
    pair = ModelPair(WIDTHS, *tokens, *heads, tuple(len(side) - 1 for side in tokens))
    loss = build_loss(name, options, widths=WIDTHS, pair=pair).to(dtype)
    torch.manual_seed(0)
    for key, parameter in loss.named_parameters():
        if (
            "projectors.t2s" not in key or method_options(name, options).needs_models == "widths"
        ):  # maps that are initialised from the heads are kept
            torch.nn.init.normal_(parameter)
    sides = []
    for which, index in (("student", 0), ("teacher", 1)):
        examples = random_examples([(n, n) for n, _ in LENGTHS] if same else LENGTHS)
        for example in examples:
            places = example[f"{which}_target"] % len(kept[index])
            example[f"{which}_target"] = places if removed else torch.tensor(kept[index])[places]
        examples = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in e.items()} for e in examples]
        sides.append(dataclasses.replace(side(examples, which, weights[index]), head=heads[index]))
    leaves = [sides[0].hidden.requires_grad_(), heads[0].weight.requires_grad_()]
    learned = [parameter for parameter in loss.parameters() if parameter.ndim == 2]
    output = loss(*sides)
    hidden, weight, *own = torch.autograd.grad(output.loss, [*leaves, *learned], allow_unused=True)
    if not removed:
        assert weight[forbidden[0]].eq(0).all()
        weight = weight[kept[0]]
    return output.terms, [hidden, weight, *own]


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize(
    ("name", "options"),
    [*ALL, ("kd", {"divergence": "jensen_shannon"}), ("gold", {"temperature": 2.0}), ("gold", {"beta": 0.0})],
)
def test_forbidden_tokens_are_as_if_they_were_not_there(name, options, impl, monkeypatch):
    """Terms and gradients equal those of heads without the forbidden tokens, as 0 x inf must not occur."""
    use_kernels(monkeypatch, head_loss=partial(head_loss, impl=impl))
    expected = run_forbidding(name, options, torch.float64, removed=True)
    torch.testing.assert_close(run_forbidding(name, options, torch.float64, removed=False), expected)


@pytest.mark.parametrize("name", METHODS)
def test_forbidden_tokens_in_float32(name):
    """The same holds in float32, which the compiled kernels require."""
    expected = run_forbidding(name, {}, torch.float32, removed=True)
    got = run_forbidding(name, {}, torch.float32, removed=False)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_token_that_only_the_student_forbids_gives_an_infinite_loss(impl, temperature, monkeypatch):
    """If only the student forbids a token, the forward KL is infinite, so that training stops."""
    use_kernels(monkeypatch, head_loss=partial(head_loss, impl=impl))
    examples, heads = random_examples([(4, 4)], vocabularies=(11, 11)), random_heads(vocabularies=(11, 11))
    examples[0]["student_target"].fill_(1)
    bias = torch.zeros(11, dtype=torch.float64).index_fill(0, torch.tensor([3]), -math.inf)
    student = dataclasses.replace(side(examples, "student", heads[0]), head=OutputHead(heads[0], bias))
    terms = KdLoss(temperature=temperature)(student, side(examples, "teacher", heads[1])).terms
    assert terms["kd"] == terms["loss"] == math.inf
    assert terms["ce"].isfinite()
    unweighted = KdLoss(temperature=temperature, kd_rate=0.0)(student, side(examples, "teacher", heads[1]))
    torch.testing.assert_close(unweighted.loss, terms["ce"], msg="0 times infinity is NaN")
    forbidden = dataclasses.replace(student, target_ids=torch.full((4,), 3))
    for name in ("sft", "alm"):
        loss = build_loss(name, {}, widths=WIDTHS, pair=pair_of(heads))
        assert loss(forbidden, side(examples, "teacher", heads[1])).terms["ce"] == math.inf


def test_padding_of_one_vocabulary_is_no_part_of_golds_share():
    """Forbidden padding of the heads does not count in the fraction of shared tokens, which must not exceed 1."""
    weights = torch.randn(14, 6), torch.randn(14, 8)
    bias = torch.zeros(14).index_fill(0, torch.tensor([11, 12, 13]), -math.inf)
    tokens = (*(bytes([97 + index]) for index in range(10)), None)
    loss = GoldLoss(pair=ModelPair(WIDTHS, tokens, tokens, *(OutputHead(weight, bias) for weight in weights), (10, 10)))
    assert (loss.matched_weight, loss.unmatched_weight) == (1, 0)
    assert loss.teacher_ids.tolist() == list(range(11))
