"""Test that SFT is the cross-entropy which torch computes from whole logits."""

import pytest
import torch

from dwakd.losses import SftLoss
from tests.losses.builders import random_examples, random_heads, side


def test_sft_is_the_cross_entropy_of_the_response():
    """The loss is the mean over all tokens of the batch, not a mean of the means of the examples."""
    heads = random_heads()
    student = side(random_examples([(5, 7), (9, 4), (1, 2)]), "student", heads[0])
    expected = torch.nn.functional.cross_entropy(student.hidden @ heads[0].T, student.target_ids)
    assert SftLoss()(student).terms["ce"].item() == pytest.approx(expected.item(), rel=1e-12)
