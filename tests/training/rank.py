"""Run one rank of trainings with two processes over gloo. test_ranks.py starts it."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from dwakd.training.end_of_run import end_of_run
from dwakd.training.interruption import RunInterrupted, stops_on_signal
from tests.training.builders import ROWS, assert_same, on_policy, trainer, weights


class SignalInStep(TrainerCallback):
    """Send SIGUSR1 to the second rank during its second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def options_of(method, accumulation, num_rows, max_tokens, lmbda):
    """Return the options of a case of test_ranks.py."""
    return {
        "rows": ROWS[:num_rows],
        "method": method,
        "per_device_train_batch_size": 2 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_tokens_per_batch": max_tokens or None,
        "ddp_backend": "gloo",
        **(on_policy(lmbda) if lmbda else {}),
    }


def stop_and_resume(folder, options, expected):
    """Stop a run by a signal to the second rank, and continue it; it must end with the expected weights."""
    stopped = trainer(folder, **options)
    stopped.add_callback(SignalInStep())
    try:
        with stops_on_signal(stopped):
            stopped.train()
    except RunInterrupted:
        assert stopped.state.global_step == 2
    else:
        raise AssertionError("the run was not interrupted")
    resumed = trainer(folder, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(resumed), expected)


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    found = {}
    for name, case in cases.items():
        run = trainer(folder / name, **options_of(*case))
        run.train()
        found[name] = weights(run)
        if run.is_world_process_zero():
            save_file(found[name], folder / name / "weights.safetensors")
            run.save_state()
    first = next(iter(cases))
    stop_and_resume(folder / "stopped", options_of(*cases[first]), found[first])
    end_of_run()
