"""DSKD against the hand-sized example of its specification."""

import pytest
import torch

from dwakd.losses import DskdLoss, Widths
from tests.losses.test_dwa_kd import tiny


@pytest.mark.parametrize(("mask", "total"), [(True, 2.725876), (False, 2.974819)])
def test_values_of_the_specification(mask, total):
    """The accuracy mask silences student-space KD wherever the projected teacher is wrong."""
    reference, student, teacher = tiny()
    loss = DskdLoss(widths=Widths(2, 2, 2, 2), accuracy_mask=mask).double()
    loss.projectors.load_state_dict(
        {k: v for k, v in reference.projectors.state_dict().items() if not k.startswith("embedding")}
    )
    terms = {name: 2 * value.item() for name, value in loss(student, teacher).terms.items()}
    assert terms["ce"] == pytest.approx(2.087876, abs=1e-6)
    assert terms["t2s_ce"] == pytest.approx(2.172809, abs=1e-6)
    assert terms["kd_teacher"] == pytest.approx(0.349408 + 0.103338 + 0.100321, abs=2e-6)
    assert terms["kd_student"] == pytest.approx(0.0 if mask else 0.240635 + 0.008308, abs=1e-6)
    assert terms["t2s_ce"] + terms["kd_student"] + terms["kd_teacher"] == pytest.approx(total, abs=1e-6)
    assert terms["loss"] == pytest.approx((2.087876 + total) / 2, abs=1e-6)
    assert torch.isfinite(loss(student, teacher).loss)
