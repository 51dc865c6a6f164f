"""Run one rank of a training whose second rank has a loss of NaN and then dies. test_interruption.py starts it by torchrun."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dwakd import UserError
from dwakd.training.lost_ranks import lost_ranks_explained
from tests.training.builders import assert_same, trainer, weights


class DieInStep(TrainerCallback):
    """Kill the second rank in its third step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class KeepWeights(TrainerCallback):
    """Keep the weights after each step."""

    def __init__(self, run: Any) -> None:
        self.run, self.found = run, [weights(run)]

    def on_step_end(self, args, state, control, **kwargs):
        self.found.append(weights(self.run))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = trainer(
        Path(sys.argv[1]), method="sft", per_device_train_batch_size=2, ddp_backend="gloo", max_skipped_steps=1
    )
    kept = KeepWeights(run)
    run.add_callback(kept)
    run.add_callback(DieInStep())
    compute = run.compute_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        return loss * torch.nan if run.state.global_step == 1 and run.args.process_index == 1 else loss

    run.compute_loss = broken  # type: ignore[method-assign]
    try:
        with lost_ranks_explained(run):
            run.train()
    except UserError as error:
        assert_same(kept.found[2], kept.found[1])
        assert run.state.stateful_callbacks["skipped_steps"] == 1
        print(f"skipped on both ranks; {error}", flush=True)
        os._exit(0)
    raise AssertionError("the second rank did not die")
