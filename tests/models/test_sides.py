"""Test that `paired_sides` gives a user's own training loop the same sides as the trainer."""

import pytest
import torch

import dwakd
from dwakd.losses import METHODS, build_loss, method_options
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
    with pytest.raises(dwakd.UserError, match=r"method dwa_kd needs the argument widths: pass dwakd\.model_widths"):
        build_loss("dwa_kd")
    loss = dwakd.DwaKdLoss(widths=dwakd.model_widths(student, teacher))
    loss(own, theirs).loss.backward()
    assert student.model.embed_tokens.weight.grad is not None
    assert teacher.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"kd"}))
def test_every_method_has_the_loss_of_the_trainer(method, tmp_path):
    """A user's own loop reaches every method, also those that compare the two vocabularies."""
    run = trainer(tmp_path, method=method)
    student, teacher = tiny_model("llama", len(TOKENIZERS[0]), seed=1), tiny_model("gemma2", len(TOKENIZERS[1]), seed=2)
    needs = method_options(method)
    pairs = dwakd.encode_rows(ROWS, *TOKENIZERS, template="plain", edit_alignment=needs.needs_edit_alignment)
    sides = dwakd.paired_sides(
        student, teacher, dwakd.collate([pairs[index] for index in range(4)]), attention=needs.needs_attention
    )
    pair = dwakd.model_pair(student, teacher, *TOKENIZERS, template="plain")
    loss = build_loss(method, widths=pair.widths, pair=pair)
    state = run.model.loss.state_dict()
    loss.load_state_dict(state)
    torch.testing.assert_close(loss(*sides).loss, run.model.loss(*sides).loss, atol=0, rtol=0)
    assert loss.state_dict().keys() == state.keys()
