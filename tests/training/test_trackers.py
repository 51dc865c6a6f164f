"""Test that trackers receive every value that is logged."""

import pytest

from tests.training.builders import ROWS, trainer

OPTIONS = {"max_steps": 2, "term_gradient_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def logged(run) -> dict[str, float]:
    """Return the values of the last step by name."""
    logs = {name: value for entry in run.state.log_history if entry["step"] == 2 for name, value in entry.items()}
    assert {"ce", "kd_student", "dtw_hidden", "term_grad_norm/ce", "eval_ce", "eval_bits_per_byte"} <= logs.keys()
    return {name: value for name, value in logs.items() if name not in ("step", "total_flos")}


def test_tensorboard(tmp_path, monkeypatch):
    """The event file of TensorBoard contains every term, norm and metric of an evaluation."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(tmp_path, eval_rows=ROWS[:3], report_to="tensorboard", **OPTIONS)
    run.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    for key, value in logged(run).items():
        name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-5), name


def test_mlflow(tmp_path, monkeypatch):
    """A local folder of MLflow contains every term, norm and metric of an evaluation, and the options of the run.

    It stores each metric in a file of its name, so that a metric named `grad_norm/ce` beside `grad_norm` would end all logging.
    """
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path / "run", eval_rows=ROWS[:3], report_to="mlflow", **OPTIONS)
    run.train()
    mlflow.end_run()
    (found,) = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri()).search_runs(["0"])
    for name, value in logged(run).items():
        assert found.data.metrics[name] == pytest.approx(value, rel=1e-6), name
    assert found.data.params["method"] == "dwa_kd"
