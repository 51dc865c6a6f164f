"""Test that `paired_sides` gives a user's own training loop the same sides as the trainer."""

import torch

import dwakd
from dwakd.models.rows import response_side
from dwakd.training.teacher import OnlineTeacher
from tests.builders import tiny_model
from tests.training.builders import ROWS, TOKENIZERS, trainer


def test_sides_equal_those_of_the_trainer(tmp_path):
    """The sides equal those of the trainer: same template, response positions and modes."""
    run = trainer(tmp_path)
    student, teacher = tiny_model("llama", len(TOKENIZERS[0]), seed=1), tiny_model("gemma2", len(TOKENIZERS[1]), seed=2)
    pairs = dwakd.encode_rows(ROWS, *TOKENIZERS, template="plain")
    batch = dwakd.collate([pairs[index] for index in (0, 3, 5)])
    expected = run.data_collator([run.train_dataset[index] for index in (0, 3, 5)])
    own, theirs = dwakd.paired_sides(student, teacher.train(), batch)
    assert teacher.training
    assert torch.equal(own.hidden, response_side(run.student, expected.student).hidden)
    side = OnlineTeacher(teacher).side(*expected.teachers)
    for name in ("hidden", "input_embeddings", "target_embeddings", "target_ids", "lengths", "byte_ends"):
        assert torch.equal(getattr(theirs, name), getattr(side, name)), name
    assert own.hidden.requires_grad
    assert not theirs.hidden.requires_grad
    loss = dwakd.DwaKdLoss(widths=dwakd.model_widths(student, teacher))
    loss(own, theirs).loss.backward()
    assert student.model.embed_tokens.weight.grad is not None
    assert teacher.model.embed_tokens.weight.grad is None
