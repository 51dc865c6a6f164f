"""Test the balance of the terms by their gradient norms."""

import pytest

from dwakd import DistillConfig, UserError
from dwakd.training.balance import KEY, term_scales
from tests.training.builders import ROWS, assert_same, trainer, weights

OPTIONS = {"term_gradient_limit": 0.02, "term_gradient_steps": 1, "max_steps": 4, "learning_rate": 1e-3}


def test_terms_above_the_limit_are_scaled_down_and_others_keep_their_weight():
    """A weak term must not be scaled up: its gradient may be noise. A term that trains only the maps has the norm 0."""
    squares = {"ce": 4.0, "kd_student": 100.0, "dtw_hidden": 1e-6, "t2s_ce": 0.0}
    assert term_scales(squares, 0.5) == {"kd_student": pytest.approx(0.1), "dtw_hidden": 1.0}
    assert term_scales(squares, None) == term_scales({"kd_student": 1.0}, 1.0) == term_scales({}, 1.0) == {}


def test_the_limit_holds_in_training_and_a_resumed_run_continues_with_the_same_scales(tmp_path):
    """The first step measures without scales; later ones keep the terms at the limit, also after an interruption."""
    sums = {"method": "sum", "loss_options": {"losses": [{"method": "dwa_kd"}, {"method": "alm"}]}}
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, **sums, **OPTIONS)
    run.train()
    first, *_, last = (log for log in run.state.log_history if "ce" in log)
    norms = {name: run.state.stateful_callbacks[KEY][name] ** 0.5 for name in ("ce", "dwa_kd.kd_student", "alm.alm")}
    for name in ("dwa_kd.kd_student", "alm.alm"):
        assert first[f"term_grad_norm/{name}"] > 0.02 * first["term_grad_norm/ce"]
        assert last[f"term_grad_norm/{name}"] == pytest.approx(0.02 * last["term_grad_norm/ce"], rel=0.35)
        assert run.balance.scales[name] == pytest.approx(0.02 * norms["ce"] / norms[name])
    resumed = trainer(tmp_path, save_strategy="no", **sums, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(run))
    assert resumed.balance.scales == run.balance.scales
    free = trainer(
        tmp_path / "free", eval_rows=ROWS[:4], **sums, **{**OPTIONS, "term_gradient_limit": None, "max_steps": 1}
    )
    free.train()
    assert free.balance.scales == {}
    before = free.evaluate()["eval_loss"]
    free.balance.trainer.model.term_scales = {"alm.alm": 0.0}
    assert free.evaluate()["eval_loss"] == before, (
        "the loss of an evaluation has no scales, so that steps can be compared"
    )


def test_the_limit_needs_a_cross_entropy_and_another_term(tmp_path):
    """Without a cross-entropy there is nothing to compare with, and nothing would happen without a message."""
    assert DistillConfig(output_dir=str(tmp_path), term_gradient_limit=0.5).term_gradient_steps == 10
    for options in ({"method": "alm", "lmbda": 1.0}, {"method": "alm", "loss_options": {"ce_weight": 0.0}}):
        with pytest.raises(UserError, match="the loss contains no ce"):
            DistillConfig(output_dir=str(tmp_path), term_gradient_limit=0.5, **options)
    with pytest.raises(UserError, match="limits terms other than ce, but method sft has none"):
        DistillConfig(output_dir=str(tmp_path), term_gradient_limit=0.5, method="sft")
