"""Test DWA-KDv2 against a literal float64 implementation, and where it equals DSKDv2."""

import dataclasses

import pytest
import torch

from dwakd.losses import DskdV2Loss, DwaKdV2Loss
from dwakd.losses.dwa_kd_v2 import exact_band
from tests.losses import reference_v2
from tests.losses.builders import pair_of
from tests.losses.test_dskd_v2 import random_batch, sided, twin_batch

NAMES = ("ce", "t2s_ce", "kd_student", "kd_teacher", "dtw_hidden", "dtw_embedding")


@pytest.mark.parametrize("seed", range(4))
def test_random_ragged_batches_equal_the_literal_reference(seed):
    """Terms and gradients equal those of the literal implementation for several options."""
    options = [{}, {"band_base": 1.0}, {"band_base": 0.5, "band_blend": 0.0, "gamma": 0.5}, {"band_penalty": 0.3}][seed]
    examples, heads, ends = random_batch(seed)
    torch.manual_seed(seed)
    loss = DwaKdV2Loss(pair=pair_of(heads), **options).double()
    leaves = [e[key].requires_grad_() for e in examples for key in ("student_hidden", "student_out")]
    head = heads[0].clone().requires_grad_()
    output = loss(*sided(examples, (head, heads[1]), ends))
    names = {"band_base": "base", "band_blend": "alpha", "band_penalty": "lam", "gamma": "gamma"}
    expected = reference_v2.exact_token_kd(
        examples,
        ends,
        head,
        heads[1],
        pair_of(heads),
        t2s=loss.projectors.t2s.weight,
        embedding_t2s=loss.embedding_t2s,
        weighted=True,
        **{names[name]: value for name, value in options.items()},
    )
    for name in NAMES:
        torch.testing.assert_close(output.terms[name], torch.as_tensor(expected[name]).detach(), msg=name)
    weights = dict.fromkeys(NAMES, 0.5) | {"dtw_hidden": 0.2, "dtw_embedding": 0.2}
    total = sum(weights[name] * expected[name] for name in NAMES)
    torch.testing.assert_close(output.loss, total)
    wanted = [head, *loss.parameters(), *leaves]
    for ours, literal in zip(*(torch.autograd.grad(value, wanted) for value in (output.loss, total)), strict=True):
        torch.testing.assert_close(ours, literal)


@pytest.mark.parametrize("mask", [True, False])
def test_unweighted_and_unaligned_is_dskd_v2(mask):
    """Without weights and Soft-DTW, DWA-KDv2 has the loss of DSKDv2."""
    examples, heads, ends = random_batch(1)
    off = {"entropy_weights": False, "gate": False, "teacher_weights": False, "dtw_weight": 0.0}
    ours = DwaKdV2Loss(pair=pair_of(heads), agreement_mask=mask, **off)
    other = DskdV2Loss(pair=pair_of(heads), agreement_mask=mask)
    assert list(ours.state_dict()) == list(other.state_dict())
    sides = sided(examples, heads, ends)
    torch.testing.assert_close(ours(*sides).loss, other(*sides).loss)


@pytest.mark.parametrize("name", ["entropy_weights", "gate", "teacher_weights"])
def test_every_weight_changes_its_term_alone(name):
    """Turning off one weight changes only the term that it applies to."""
    examples, heads, ends = random_batch(1)
    sides = sided(examples, heads, ends)
    torch.manual_seed(0)
    everything = DwaKdV2Loss(pair=pair_of(heads), agreement_mask=False).double()
    without = DwaKdV2Loss(pair=pair_of(heads), agreement_mask=False, **{name: False}).double()
    without.load_state_dict(everything.state_dict())
    changed = {
        term for term, value in everything(*sides).terms.items() if not torch.equal(value, without(*sides).terms[term])
    }
    assert changed == {"loss", "kd_teacher" if name == "teacher_weights" else "kd_student"}


def test_identical_models_train_only_the_map_of_embeddings():
    """For identical models, all distillation terms are 0 except the one of the embeddings, whose map is untrained."""
    student, teacher, pair = twin_batch()
    terms = DwaKdV2Loss(pair=pair).double()(student, teacher).terms
    for name in ("kd_student", "kd_teacher", "dtw_hidden"):
        assert terms[name].item() == pytest.approx(0, abs=1e-9), name
    assert terms["dtw_embedding"] > 0


def test_band_follows_the_pairs_and_elsewhere_the_diagonal():
    """The centre of the band is the aligned token, and the diagonal for tokens without alignment."""
    partners, lengths = torch.tensor([2, -1, 3, 4]), (torch.tensor([3, 1]), torch.tensor([4, 3]))
    band = exact_band(partners, *lengths, base=1.0, blend=1.0, penalty=2.0, length=3).penalties(4)
    # the centres of the rows are 3, 2 * 4 / 3 and 4, counted from 1, in four columns
    assert band[0].tolist() == [[2, 0, 0, 0], [2, 0, 0, 2], [2, 2, 0, 0]]
    assert band[1, 0, :3].tolist() == [0, 0, 2]


def test_band_of_identical_tokenisations_is_exact():
    """With identical tokenisations, rounding of the centre does not change which cells are inside the band."""
    count = 40
    band = exact_band(
        torch.arange(count), *[torch.tensor([count])] * 2, base=5.0, blend=0.7, penalty=1.0, length=count
    ).penalties(count)
    distance = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    assert torch.equal(band[0], (distance > 5).float())


def test_no_aligned_token_is_finite():
    """If no token is aligned, the three token-level terms are 0 and the gradient is finite."""
    student, teacher, pair = twin_batch()
    student = dataclasses.replace(student, byte_ends=100 + student.byte_ends, hidden=student.hidden.requires_grad_())
    output = DwaKdV2Loss(pair=pair).double()(student, teacher)
    assert [output.terms[name].item() for name in NAMES[1:4]] == [0, 0, 0]
    output.loss.backward()
    assert torch.isfinite(student.hidden.grad).all()


def test_needs_a_teacher():
    """A missing teacher raises a ValueError that names the method."""
    student, _, pair = twin_batch()
    with pytest.raises(ValueError, match="DwaKdV2Loss needs a teacher"):
        DwaKdV2Loss(pair=pair)(student)
