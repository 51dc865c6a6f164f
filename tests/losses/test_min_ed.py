"""Test MinED: the map between vocabularies, the loss, and the alignment of a data set."""

import dataclasses
import sys

import pytest
import torch

from dwakd.batch import ModelSide, OutputHead
from dwakd.data.collator import collate
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import align_by_spelling, encode_pairs
from dwakd.data.rows import Example
from dwakd.losses import MinEdLoss, ModelPair, Widths
from tests.builders import SAMPLE_TEXTS, bpe_byte_fallback, byte_bpe, unigram_byte_fallback
from tests.training.builders import trainer

STUDENT, TEACHER = (b"cat", b"s", b"dog", None), (b"cats", b"cat", b"x", b"dog", None, b"s")
# the nearest tokens: cats -> cat, cat -> cat, x -> s (the first at distance 1), dog -> dog, end -> end, s -> s
STUDENT_OF = [0, 0, 1, 2, 3, 1]


def grouped_sides(student_width: int, teacher_width: int, student_ids: list[int], teacher_ids: list[int]):
    """Return 4 student and 5 teacher tokens of one text in float64, in the groups (0, 1 | 0, 1), (2 | 2, 3), (3 | 4)."""
    generator = torch.Generator().manual_seed(0)
    own = (torch.randn(4, student_width, generator=generator).double() * 2).requires_grad_()
    theirs = torch.randn(5, teacher_width, generator=generator).double() * 2
    sides = logit_side(own, student_ids), logit_side(theirs, teacher_ids)
    ends = torch.tensor([2, 3, 5, 5]), torch.tensor([1, 3, 4, 5, 5])
    return [dataclasses.replace(side, byte_ends=end) for side, end in zip(sides, ends, strict=True)]


def logit_side(logits: torch.Tensor, targets: list[int], aligned: list[int] | None = None) -> ModelSide:
    """Return a side whose head is the identity, so that its hidden states are its logits."""
    return ModelSide(
        hidden=logits,
        input_embeddings=logits.detach(),
        target_embeddings=logits.detach(),
        target_ids=torch.tensor(targets),
        lengths=torch.tensor([len(targets)]),
        byte_ends=torch.arange(1, len(targets) + 1),
        head=OutputHead(torch.eye(logits.shape[1], dtype=logits.dtype)),
        aligned_rows=None if aligned is None else torch.tensor(aligned),
    )


def pair(student=STUDENT, teacher=TEACHER, widths=(4, 6), ends=(3, 4)) -> ModelPair:
    heads = [OutputHead(torch.eye(width)) for width in widths]
    return ModelPair(Widths(widths[0], widths[1], widths[0], widths[1]), student, teacher, *heads, ends)


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(3, width, generator=generator).double() * 2 for width in (4, 6))
    return logit_side(own.requires_grad_(), [2, 0, 3]), logit_side(theirs, [3, 1, 4], [1, -1, 2])


def kl(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (torch.xlogy(p, p) - p * log_q).sum(-1)


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_mass_goes_to_the_nearest_spelling(sides, tau):
    """The probability of each teacher token is added to the student token of least edit distance."""
    student, teacher = sides
    loss = MinEdLoss(pair=pair(), temperature=tau)
    assert loss.student_of.tolist() == STUDENT_OF
    probs, log_q = (teacher.hidden / tau).softmax(-1), (student.hidden / tau).log_softmax(-1)
    carried = torch.zeros(3, 4).double()
    for column, token in enumerate(STUDENT_OF):
        carried[:, token] += probs[:, column]
    expected = (kl(carried[1], log_q[0]) - log_q[1, 0] + kl(carried[2], log_q[2])) / 3
    terms = loss(student, teacher).terms
    assert terms["kd"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert terms["loss"].item() == pytest.approx((terms["ce"] + terms["kd"]).item() / 2, rel=1e-10)


def test_the_port_keeps_the_first_teacher_token(sides):
    """With `vocabulary_map="first"`, the targets are those of the published code.

    Their logits are -1e5 for tokens to which no teacher token is mapped. At unaligned positions, the label has the
    logit 100.
    """
    student, teacher = sides
    loss = MinEdLoss(pair=pair(), vocabulary_map="first")
    assert loss.student_of.tolist() == [0, -1, 1, 2, 3, -1]
    target = torch.full((3, 4), -1e5).double()
    target[0], target[2] = teacher.hidden[1, [0, 2, 3, 4]], teacher.hidden[2, [0, 2, 3, 4]]
    target[1, 0] = 100
    expected = kl((target / 2).softmax(-1), (student.hidden / 2).log_softmax(-1)).mean()
    assert loss(student, teacher).terms["kd"].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("budget", [1, 2**27])
@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0, 3.0])
def test_the_gradient_by_hand_is_that_of_the_formula(monkeypatch, sides, tau, budget):
    """The in-place computation gives the loss and the gradient of plain torch."""
    monkeypatch.setattr(sys.modules["dwakd.kernels.head_loss"], "BUDGET_BYTES", budget)
    loss = MinEdLoss(pair=pair(), temperature=tau, kd_rate=0.3)
    results = []
    for impl in ("chunked", "naive"):
        original = sys.modules["dwakd.losses.min_ed"].head_loss
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["dwakd.losses.min_ed"], "head_loss", lambda *a, i=impl, f=original: f(*a, impl=i))
            output = loss(*sides)
        results.append((output.loss, torch.autograd.grad(output.loss, sides[0].hidden)[0]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_one_vocabulary_is_forward_kl():
    """With one tokenizer, the loss is the forward KL over the vocabulary entries that both heads have."""
    generator = torch.Generator().manual_seed(1)
    own, theirs = torch.randn(4, 5, generator=generator), torch.randn(4, 7, generator=generator)
    tokens = (b"a", None, b"b", b"c", b"ab")
    student, teacher = logit_side(own, [0, 1, 2, 3]), logit_side(theirs, [0, 1, 2, 3], [0, 1, 2, 3])
    terms = MinEdLoss(pair=pair(tokens, tokens, (5, 7), (1, 1)))(student, teacher).terms
    expected = kl((theirs[:, :5] / 2).softmax(-1), (own / 2).log_softmax(-1)).mean()
    assert terms["kd"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_targets_leave_the_students_logits_alone():
    """The computation does not overwrite the student's logits, unlike the published code."""
    generator = torch.Generator().manual_seed(2)
    own = torch.randn(3, 4, generator=generator)
    before = own.clone()
    student, teacher = logit_side(own, [2, 0, 3]), logit_side(torch.randn(3, 6), [3, 1, 4], [-1, -1, -1])
    assert MinEdLoss(pair=pair())(student, teacher).terms["kd"] > 0.5
    assert torch.equal(own, before)


def test_same_prefix_drops_rows_that_have_read_other_text(sides):
    """`same_prefix` removes aligned positions at which the models have read different text."""
    student, teacher = sides
    student = dataclasses.replace(student, byte_ends=torch.tensor([2, 4, 4]))
    teacher = dataclasses.replace(teacher, aligned_rows=torch.tensor([0, 1, 2]), byte_ends=torch.tensor([3, 4, 4]))
    got = MinEdLoss(pair=pair(), same_prefix=True)(student, teacher).terms["kd"]
    expected = MinEdLoss(pair=pair())(student, dataclasses.replace(teacher, aligned_rows=torch.tensor([0, -1, 2])))
    assert got == expected.terms["kd"]


def test_what_is_missing_or_unknown_is_named(sides):
    """A missing alignment or an unknown option raises a ValueError that names it."""
    student, teacher = sides
    with pytest.raises(ValueError, match="needs aligned_rows"):
        MinEdLoss(pair=pair())(student, dataclasses.replace(teacher, aligned_rows=None))
    with pytest.raises(ValueError, match="'sum' or 'first'"):
        MinEdLoss(pair=pair(), vocabulary_map="mean")


EXAMPLES = [Example(index, f"Say {index}.", response=text) for index, text in enumerate(SAMPLE_TEXTS)]


def aligned(*builders):
    encoders = [TextEncoder(build(), "plain") for build in builders]
    pairs = encode_pairs(EXAMPLES, *encoders)
    align_by_spelling(pairs, *encoders)
    return pairs, encoders


@pytest.mark.parametrize("build", [byte_bpe, unigram_byte_fallback])
def test_one_tokenizer_accepts_every_position(build):
    """With one tokenizer, each position is aligned with itself."""
    pairs, _ = aligned(build, build)
    for row in pairs.rows:
        assert row.teachers[0].aligned_rows.tolist() == list(range(len(row.student.byte_ends)))


def test_aligned_rows_read_the_same_and_reach_the_batch():
    """Most positions are aligned, aligned tokens have equal bytes, and the collated batch contains the alignment."""
    pairs, encoders = aligned(byte_bpe, bpe_byte_fallback)
    spelled = [encoder.token_bytes() for encoder in encoders]
    batch = collate([pairs[index] for index in range(len(pairs))])
    aligned_rows = batch.teachers[0].aligned_rows.split(batch.student.num_rows)
    num_aligned = 0
    for index, row in enumerate(pairs.rows):
        places = aligned_rows[index].tolist()
        assert places == row.teachers[0].aligned_rows.tolist()
        for own, other in enumerate(places):
            if other > 0:
                tokens = [
                    spelled[n][side.ids[side.num_prompt - 1 + place]]
                    for n, (side, place) in enumerate(((row.student, own), (row.teachers[0], other)))
                ]
                assert tokens[0] == tokens[1] or tokens[1] not in spelled[0]
                num_aligned += 1
    assert num_aligned > 0.5 * sum(len(row.student.byte_ends) for row in pairs.rows)


def test_equal_student_tokens_follow_one_teacher_token():
    """Several student tokens may be aligned with the same teacher token."""
    words = ["abcd", "efgh"]
    encoders = [TextEncoder(byte_bpe(texts), "plain") for texts in (words, [*words, "---"])]
    pairs = encode_pairs([Example(0, "abcd", response="efgh---efgh")], *encoders)
    align_by_spelling(pairs, *encoders)
    student, teacher = pairs.rows[0].student, pairs.rows[0].teachers[0]
    assert [len(side.byte_ends) for side in (student, teacher)] == [6, 4]
    # the student reads abcd efgh - - - efgh, the teacher abcd efgh --- efgh
    assert teacher.aligned_rows.tolist() == [0, 1, 2, 2, 2, 3]


def test_a_run_aligns_its_data_sets(tmp_path):
    """Training and evaluation data are aligned for methods that need the alignment, and only for these."""
    rows = [{"prompt": "Name one.", "response": "A red door."}]
    run = trainer(tmp_path, method="min_ed", eval_rows=rows, max_steps=2)
    assert "aligned_rows" in run.train_dataset[0]["teachers"][0]
    run.train()
    assert run.evaluate()["eval_kd"] > 0
    assert "aligned_rows" not in trainer(tmp_path, method="alm").train_dataset[0]["teachers"][0]
