"""Run one rank of a training that a signal to the second rank interrupts. test_interruption.py starts it through torchrun."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dwakd.training.interruption import RunInterrupted, stops_on_signal
from dwakd.training.run import end_of_run
from tests.training.builders import assert_same, trainer, weights


class SignalInStep(TrainerCallback):
    """Send SIGUSR1 to the second rank during its second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    options: dict[str, Any] = {"method": "dwa_kd", "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    whole = trainer(folder / "whole", **options)
    whole.train()
    expected = weights(whole)
    stopped = trainer(folder / "stopped", **options)
    stopped.add_callback(SignalInStep())
    try:
        with stops_on_signal(stopped):
            stopped.train()
    except RunInterrupted:
        assert stopped.state.global_step == 2
    else:
        raise AssertionError("the run was not interrupted")
    resumed = trainer(folder / "stopped", **options)
    resumed.train(resume_from_checkpoint=str(folder / "stopped" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(resumed), expected)
    end_of_run()
