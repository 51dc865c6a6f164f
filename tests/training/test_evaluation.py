"""Test the metrics of a user's function: numbers of all types are accepted, and mistakes are reported."""

import json

import numpy as np
import pytest
import torch

from dwakd import UserError
from dwakd.training.evaluation import plain_metrics
from tests.training.builders import ROWS, trainer


@pytest.mark.parametrize(
    "value", [0.5, np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.array(0.5), torch.tensor(0.5)]
)
def test_metrics_of_users_become_plain_numbers(value):
    """Numbers of numpy and torch become plain numbers, because checkpoints store them as JSON."""
    plain = plain_metrics({"score": value})
    assert json.loads(json.dumps(plain))["score"] == float(value)


@pytest.mark.parametrize(
    "metrics", [{"f1": np.array([0.1, 0.2])}, {"f1": object()}, {1: 0.5}, [("f1", 0.5)], 0.5, None]
)
def test_metrics_that_are_no_numbers_are_named(metrics):
    """A value that is not a number raises a UserError that names the metric."""
    with pytest.raises(UserError, match=r"compute_metrics.*(f1|1|list|float|None)"):
        plain_metrics(metrics)


def test_metrics_that_the_best_model_needs_are_checked(tmp_path):
    """A missing `metric_for_best_model`, or a metric with the name of a term, raises a UserError."""
    options = {"method": "sft", "eval_rows": ROWS[:2], "eval_max_new_tokens": 2, "metric_for_best_model": "f1"}
    with pytest.raises(UserError, match="metric_for_best_model f1"):
        trainer(tmp_path, **options)
    run = trainer(tmp_path, **{**options, "metric_for_best_model": None})
    run.args.metric_for_best_model = "f1"
    for metrics, named in (({"f1": None}, "f1"), ({"f1": float("nan")}, "nan"), ({"ce": 0.1}, "ce"), ({"em": 1}, "f1")):
        run.metrics_function = lambda prediction, metrics=metrics: metrics
        with pytest.raises(UserError, match=named):
            run.evaluate()


def test_metrics_are_logged_as_numbers(tmp_path):
    """The metrics appear as numbers in the log and in the saved state."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, method="sft", max_steps=1, eval_rows=ROWS[:2], eval_max_new_tokens=3, **options)
    run.metrics_function = lambda prediction: {"score": np.float32(0.5)}
    run.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert [entry["eval_score"] for entry in state["log_history"] if "eval_score" in entry] == [0.5]


def test_accuracies_of_the_projected_teacher_and_of_the_teacher(tmp_path):
    """Evaluation reports both accuracies, and the teacher's does not depend on the batch size."""
    options = {"eval_rows": ROWS, "loss_options": {"alignment": "bytes", "values": "hidden"}}
    found = [trainer(tmp_path, per_device_eval_batch_size=size, **options).evaluate() for size in (1, 16)]
    for name in ("eval_t2s_accuracy", "eval_teacher_accuracy"):
        assert 0 <= found[0][name] <= 1
    assert found[0]["eval_teacher_accuracy"] == found[1]["eval_teacher_accuracy"]
    assert "eval_t2s_accuracy" not in trainer(tmp_path, method="alm", eval_rows=ROWS[:2]).evaluate()
