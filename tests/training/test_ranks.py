"""Test that two ranks over gloo give the result of one process with the same global batch."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.builders import ROWS, assert_same, on_policy, trainer, weights
from tests.two_ranks import run_on_two_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("method", "accumulation", "num_rows", "max_tokens"),
    [("dwa_kd", 1, 16, 0), ("sft", 2, 16, 0), ("min_ed", 1, 13, 100), ("dwa_kd", 1, 13, 0)],
)
def test_two_ranks_equal_one(tmp_path, method, accumulation, num_rows, max_tokens):
    """Two ranks end with the weights and terms of one process.

    With thirteen rows, one row is left for the last step, which accelerate fills by repeating other rows on both ranks. With
    `max_tokens`, the ranks have different numbers of micro-batches.
    """
    arguments = [tmp_path / "two", method, 2 // accumulation, accumulation, num_rows, max_tokens]
    run_on_two_ranks("tests.training.rank", *arguments)
    one = trainer(tmp_path / "one", rows=ROWS[:num_rows], method=method, per_device_train_batch_size=4)
    one.train()
    assert_same(load_file(tmp_path / "two" / "weights.safetensors"), weights(one), atol=2e-4)
    logged = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for got, expected in zip(logged, one.state.log_history, strict=True):
        for name in ("ce", "loss", "kd_teacher", "dtw_hidden", "grad_norm"):
            if name in expected:
                assert got[name] == pytest.approx(expected[name], rel=5e-4), name


@pytest.mark.parametrize(("method", "lmbda", "num_rows"), [("alm", 0.5, 13), ("kd", 1.0, 16)])
def test_two_ranks_give_the_answers_and_the_student_of_one(tmp_path, method, lmbda, num_rows):
    """Each rank answers its own prompts; one rank may have sampled answers only and the other none."""
    run_on_two_ranks("tests.training.rank", tmp_path / "two", method, 2, 1, num_rows, 120, lmbda)
    one = trainer(tmp_path / "one", rows=ROWS[:num_rows], method=method, **on_policy(lmbda))
    one.train()
    assert_same(load_file(tmp_path / "two" / "weights.safetensors"), weights(one), atol=2e-4)
    logged = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for got, expected in zip(logged, one.state.log_history, strict=True):
        assert got.keys() == expected.keys()
        for name in expected.keys() - {"epoch"}:
            if "per_second" not in name and "runtime" not in name and "flos" not in name:
                assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
