"""Test that trackers receive every value that is logged."""

import io
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers.trainer_callback import TrainerCallback

from dwakd.inspection.trackers import AlignmentCallback
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
    run.add_callback(AlignmentCallback(run))
    run.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    for key, value in logged(run).items():
        name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-5), name
    if find_spec("altair") and find_spec("vl_convert"):
        for name, image in AlignmentCallback(run).images().items():
            first, last = events.Images(name)
            assert (first.step, last.step) == (1, 2)
            assert Image.open(io.BytesIO(last.encoded_image_string)).convert("RGB").tobytes() == image.tobytes()


def test_mlflow(tmp_path, monkeypatch):
    """A local folder of MLflow contains every term, norm and metric of an evaluation, and the options of the run.

    It stores each metric in a file of its name, so that a metric named `grad_norm/ce` beside `grad_norm` would end all logging.
    """
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path / "run", eval_rows=ROWS[:3], report_to="mlflow", **OPTIONS)
    run.add_callback(AlignmentCallback(run))
    run.train()
    mlflow.end_run()
    (found,) = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri()).search_runs(["0"])
    for name, value in logged(run).items():
        assert found.data.metrics[name] == pytest.approx(value, rel=1e-6), name
    assert found.data.params["method"] == "dwa_kd"


@pytest.mark.parametrize("options", [{"eval_strategy": "steps", "eval_steps": 2}, {"eval_strategy": "no"}])
def test_figures_of_the_alignment(tmp_path, options):
    """W&B and Trackio get each map of the trained loss once at the last step, whether it is evaluated or not.

    A map of other weights than those of that step would show an alignment that the student does not have.
    """
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")

    class TrackioCallback(TrainerCallback):
        _trackio = SimpleNamespace(Image=lambda image: image, log=lambda values: sent.append(values))

    sent = []
    run = trainer(tmp_path, eval_rows=ROWS[:3], **OPTIONS | options)
    run.add_callback(TrackioCallback())
    run.add_callback(AlignmentCallback(run))
    before = AlignmentCallback(run).images()
    run.train()
    images = AlignmentCallback(run).images()
    names = ["cross-model_attention", "expected_path_of_the_hidden_states", "expected_path_of_the_embeddings"]
    assert list(images) == [f"alignment/dwa_kd_{name}" for name in names]
    assert [one.pop("train/global_step") for one in sent] == [2] * 3
    for (name, image), one in zip(images.items(), sent, strict=True):
        assert one[name].tobytes() == image.tobytes() != before[name].tobytes()
