"""Test that two ranks over gloo give the result of one process with the same global batch."""

import json

import pytest
from safetensors.torch import load_file

from tests.training.builders import ROWS, assert_same, on_policy, trainer, weights
from tests.two_ranks import run_on_two_ranks

CASES = {
    "whole batches": ("dwa_kd", 1, 16, 0, 0.0),
    "accumulation": ("sft", 2, 16, 0, 0.0),
    "repeated rows and aligned rows": ("min_ed", 1, 13, 100, 0.0),
    "repeated rows": ("dwa_kd", 1, 13, 0, 0.0),
    "some answers": ("alm", 1, 13, 120, 0.5),
    "answers only": ("kd", 1, 16, 120, 1.0),
}
"""Method, accumulated batches, rows, the option max_tokens_per_batch, and the share of the prompts that the student answers."""


def test_two_ranks_equal_one(tmp_path):
    """Two ranks end with the weights and terms of one process.

    With thirteen rows, one row is left for the last step, which accelerate fills by repeating other rows on both ranks. With
    a limit of tokens, the ranks have different numbers of micro-batches. Each rank answers its own prompts; one rank may have
    sampled answers only and the other none.

    A scheduler signals the ranks at different times: all of them save the same step, and the resumed run ends with the same
    weights.
    """
    run_on_two_ranks("tests.training.rank", tmp_path / "two", json.dumps(CASES))
    for case, (method, _, num_rows, _, lmbda) in CASES.items():
        options, rel = (on_policy(lmbda), 1e-3) if lmbda else ({}, 5e-4)
        one = trainer(tmp_path / "one", rows=ROWS[:num_rows], method=method, per_device_train_batch_size=4, **options)
        one.train()
        assert_same(load_file(tmp_path / "two" / case / "weights.safetensors"), weights(one), atol=2e-4)
        logged = json.loads((tmp_path / "two" / case / "trainer_state.json").read_text())["log_history"]
        for got, expected in zip(logged, one.state.log_history, strict=True):
            assert got.keys() == expected.keys(), case
            for name in expected.keys() - {"epoch"}:
                if "per_second" not in name and "runtime" not in name and "flos" not in name:
                    assert got[name] == pytest.approx(expected[name], rel=rel, abs=1e-6), (case, name)
