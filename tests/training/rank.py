"""Run one rank of a training with two processes over gloo. test_ranks.py starts it through torchrun."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dwakd.training.run import end_of_run
from tests.training.builders import ROWS, on_policy, trainer, weights

if __name__ == "__main__":
    output, method, batch_size, accumulation, num_rows, max_tokens, *lmbda = sys.argv[1:]
    torch.set_num_threads(1)
    run = trainer(
        Path(output),
        rows=ROWS[: int(num_rows)],
        method=method,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation),
        max_tokens_per_batch=int(max_tokens) or None,
        ddp_backend="gloo",
        **(on_policy(float(lmbda[0])) if lmbda else {}),
    )
    run.train()
    if run.is_world_process_zero():
        save_file(weights(run), Path(output) / "weights.safetensors")
        run.save_state()
    end_of_run()
