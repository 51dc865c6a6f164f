"""Test training and resuming with the methods whose projectors are initialised from the heads."""

import pytest
import torch

from dwakd.models.head import output_head
from tests.training.builders import assert_same, trainer, weights

METHODS = ("dskd_v2", "dwa_kd_v2")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_ends_with_the_same_student(tmp_path, method, lora):
    """A resumed run uses the trained t2s, not one that is initialised again from the student."""
    options = {"method": method, "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "lora": lora}
    whole = trainer(tmp_path, **options)
    start = whole.model.loss.projectors.t2s.weight.detach().clone()
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not torch.equal(start, whole.model.loss.projectors.t2s.weight)
    assert_same(weights(resumed), weights(whole))
    logs = [[e["loss"] for e in run.state.log_history if "loss" in e][-2:] for run in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gpt2", "phi"), ("phi", "cohere"), ("opt_projected", "granite"), ("gemma2", "opt_projected")],
)
def test_heads_with_biases_scales_and_ties(tmp_path, method, student, teacher):
    """Training works with tied heads, biases, scales, soft caps and different widths, for student and teacher."""
    run = trainer(tmp_path, method=method, student=student, teacher=teacher, max_steps=2, learning_rate=1e-3)
    maps = run.model.loss.projectors
    assert (maps.t2s.bias is not None) == ("phi" in (student, teacher))
    run.train()
    logs = [entry for entry in run.state.log_history if "ce" in entry]
    assert all(torch.isfinite(torch.tensor(list(entry.values()))).all() for entry in logs)
    assert logs[0]["t2s_ce"] > 0
    assert logs[0]["kd_teacher"] > 0
    assert maps.student_tokens.shape == (output_head(run.teachers[0].model).vocab_size,)
