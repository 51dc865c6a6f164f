"""Run one rank of trainings whose teacher is divided among two processes. test_tensor_parallel.py starts it."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from dwakd.training.end_of_run import end_of_run
from dwakd.training.teacher import OnlineTeacher
from tests.training.builders import trainer, weights

if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for name, options in cases.items():
        half: dict[str, Any] = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
        divided: dict[str, Any] = {
            "teacher_model": str(folder / "teacher"),
            "teacher_model_init_kwargs": {"tp_plan": "auto"},
        }
        run = trainer(folder / name, **half, **divided, **options)
        teacher = run.teachers[0]
        assert isinstance(teacher, OnlineTeacher)
        shards = [parameter for parameter in teacher.model.parameters() if isinstance(parameter, DTensor)]
        assert sum(shard.to_local().numel() < shard.numel() for shard in shards) > 10
        run.train()
        run.evaluate()
        if os.environ["RANK"] == "0":
            save_file(weights(run), folder / name / "weights.safetensors")
            run.save_state()
    end_of_run()
