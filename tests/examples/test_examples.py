"""Test that the examples run offline."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_loop_trains():
    """The example of a training loop without the trainer trains a student."""
    losses = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]([])
    assert sum(losses[-3:]) < sum(losses[:3])


def test_sft_trainer_trains_or_says_what_is_missing():
    """The example of a subclass of TRL's trainer runs. Without TRL, the message says what to install."""
    run = subprocess.run(
        [sys.executable, EXAMPLES / "sft_trainer.py"], capture_output=True, text=True, timeout=300, check=False
    )
    if importlib.util.find_spec("trl") is None:
        assert run.returncode == 1
        assert run.stderr.strip().endswith("pip install trl")
        assert len(run.stderr.strip().splitlines()) == 1
        pytest.skip("TRL is not installed")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "train_loss" in run.stdout
