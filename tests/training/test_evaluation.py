"""Test the metrics of a user's function: numbers of all types are accepted, and mistakes are reported."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from dwakd import UserError
from dwakd.align.offsets import exact_rows
from dwakd.data.encoding import TextEncoder
from dwakd.training.evaluation import plain_metrics
from tests.builders import tiny_model
from tests.training.builders import ROWS, TOKENIZERS, trainer


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


def aligned_pairs():
    """Return the target of the student and that of the teacher for each exactly aligned token of ROWS."""
    pairs = []
    for row in ROWS:
        sides = []
        for tokenizer in TOKENIZERS:
            ids, ends = TextEncoder(tokenizer, "plain").response_ids(row["response"])
            sides.append(([*ids, tokenizer.eos_token_id], torch.tensor([*ends, len(row["response"].encode())])))
        (own, own_ends), (theirs, ends) = sides
        partners = exact_rows(own_ends, torch.tensor([len(own)]), ends, torch.tensor([len(theirs)])).tolist()
        pairs += [(target, theirs[place]) for target, place in zip(own, partners, strict=True) if place >= 0]
    return pairs


@pytest.mark.parametrize("batch_size", [5, 16])
def test_accuracies_of_the_projected_teacher_and_of_the_teacher(tmp_path, batch_size):
    """A user compares the two shares to see a leak, so both must be over the aligned tokens of all batches.

    Each head has a bias that makes it always predict one token: the most frequent one in the student's vocabulary, and the
    least frequent one in the teacher's.
    """
    pairs = aligned_pairs()
    own, theirs = (Counter(targets).most_common() for targets in zip(*pairs, strict=True))
    teacher = tiny_model("phi", len(TOKENIZERS[1]))
    options = {"per_device_eval_batch_size": batch_size, "student": "phi", "teacher_model": teacher, "eval_rows": ROWS}
    run = trainer(tmp_path, loss_options={"alignment": "bytes", "values": "hidden"}, **options)
    with torch.no_grad():
        run.student.lm_head.bias[own[0][0]] += 100
        teacher.lm_head.bias[theirs[-1][0]] += 100
    metrics = run.evaluate()
    assert own[0][1] > theirs[-1][1] > 0
    assert metrics["eval_t2s_accuracy"] == pytest.approx(own[0][1] / len(pairs))
    assert metrics["eval_teacher_accuracy"] == pytest.approx(theirs[-1][1] / len(pairs))


def test_a_method_without_a_projection_has_no_accuracies(tmp_path):
    """The accuracies would be those of nothing."""
    assert "eval_t2s_accuracy" not in trainer(tmp_path, method="alm", eval_rows=ROWS[:2]).evaluate()
