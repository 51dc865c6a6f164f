"""Train with transformers' Trainer and accelerate's FSDP2 over gloo, stop and resume on other numbers of ranks.

accelerate selects FSDP on accelerators only. On CPUs it falls back to DDP without a message, so `force_fsdp` selects FSDP by
hand, and the module asserts that parameters are DTensors.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from transformers import Trainer

from dwakd.errors import UserError
from dwakd.training.end_of_run import end_of_run
from tests.training.builders import ROWS, trainer

OPTIONS: dict[str, Any] = {
    "method": "dwa_kd",
    "student": "qwen2",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_rows": ROWS[:4],
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "projector_learning_rate": 1e-2,
    "adam_epsilon": 1e-2,  # otherwise, AdamW divides rounding errors by themselves
}


def force_fsdp(*, bf16: bool) -> None:
    """Let accelerate use FSDP2 on CPUs; `bf16` sets the policy that accelerate sets for training.bf16."""
    create = Trainer.create_accelerator_and_postprocess

    def create_with_fsdp(self: Trainer) -> None:
        create(self)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
        )
        if bf16:
            plugin.set_mixed_precision("bf16")
        AcceleratorState.distributed_type = property(lambda _: DistributedType.FSDP, lambda *_: None)
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = create_with_fsdp


def run_rank(rank: int, count: int, name: str, folder: Path) -> None:
    """Run one of several ranks, and resume from the second step of the run on four ranks if there is one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29620 + count), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{name}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    force_fsdp(bf16=name == "adapter")
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_tokens_per_batch": 120} if count == 2 else {}
    train(name, folder, per_device_train_batch_size=1 if count > 1 else 4, **options)
    end_of_run()


def train(name: str, folder: Path, **options: Any) -> None:
    """Train and save, in this process alone or as one of several ranks."""
    if name.startswith("adapter"):
        options |= {"lora": True, "max_steps": 1}
    run = trainer(folder / name, **OPTIONS, **options)
    checkpoint = folder / "four" / "checkpoint-2"
    run.train(resume_from_checkpoint=str(checkpoint) if name.startswith("resumed") else None)
    parameters = list(run.model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters) == run.is_fsdp_enabled
    run.save_model()
    run.save_state()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for count, name in ((4, "four"), (2, "resumed_on_two"), (1, "resumed_on_one"), (2, "adapter")):
        start_processes(run_rank, (count, name, folder), nprocs=count, start_method="fork")
    with pytest.raises(UserError, match="was saved with FSDP: resume the run with FSDP"):
        train("resumed_without_fsdp", folder)
    train("alone", folder)
    train("adapter_alone", folder)
