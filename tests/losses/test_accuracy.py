"""Test the accuracies of the projected teacher and of the teacher against counts of single tokens."""

import pytest
import torch

from dwakd.losses import DwaKdLoss, SftLoss, TeacherScale
from dwakd.losses.accuracy import count_correct
from tests.losses.builders import WIDTHS, random_heads, side
from tests.losses.test_crossing import ENDS, examples_with_ends


@pytest.mark.parametrize("options", [{}, {"variant": "recommended"}])
def test_counts_of_exactly_aligned_tokens(options):
    """The counts include the tokens for which a teacher token starts and ends at the same bytes."""
    torch.manual_seed(0)
    loss = DwaKdLoss(widths=WIDTHS, **options).double()
    examples, heads = examples_with_ends(), random_heads()
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    scale = TeacherScale.of(sides[1])
    projected = loss.projected(*sides, scale).hidden
    expected, row = {"aligned": 0, "t2s": 0, "teacher": 0}, 0
    for example, (own_ends, ends) in zip(examples, ENDS, strict=True):
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        for i, span in enumerate(zip([0, *own_ends[:-1]], own_ends, strict=True)):
            if span in spans:
                j = spans.index(span)
                expected["aligned"] += 1
                expected["t2s"] += int((heads[0] @ projected[row]).argmax() == example["student_target"][i])
                logits = heads[1] @ example["teacher_hidden"][j]
                expected["teacher"] += int(logits.argmax() == example["teacher_target"][j])
            row += 1
    assert 3 < expected["aligned"] < row
    assert {name: int(value) for name, value in count_correct(loss, *sides, scale).items()} == expected


def test_methods_without_a_projection_have_no_counts():
    """Methods without a projection of the teacher have no accuracies."""
    examples, heads = examples_with_ends(), random_heads()
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    assert count_correct(SftLoss(), *sides, TeacherScale.of(sides[1])) == {}


def test_a_batch_without_aligned_tokens():
    """Without aligned tokens, the counts are 0 and the head is not called with an empty tensor."""
    examples, heads = examples_with_ends()[3:], random_heads()
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    loss = DwaKdLoss(widths=WIDTHS).double()
    examples[0]["teacher_ends"] = torch.tensor([1, 3, 5, 7, 10])
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    assert {name: int(n) for name, n in count_correct(loss, *sides, TeacherScale.of(sides[1])).items()} == {
        "aligned": 0, "t2s": 0, "teacher": 0,
    }  # fmt: skip
