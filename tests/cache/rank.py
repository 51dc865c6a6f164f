"""Run one rank of a training with two processes that builds its cache. test_build.py starts it."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dwakd.cache.store import Cache
from dwakd.training.end_of_run import end_of_run
from tests.cache.builders import LONG, trainer
from tests.shards import record_shards
from tests.training.builders import weights

if __name__ == "__main__":
    teacher, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    record_shards(Cache, folder)
    run = trainer(
        folder / "two",
        teacher,
        cache=folder / "cache",
        per_device_train_batch_size=2,
        ddp_backend="gloo",
        rows=LONG[:13],
    )
    run.train()
    if run.is_world_process_zero():
        save_file(weights(run), folder / "weights.safetensors")
    end_of_run()
