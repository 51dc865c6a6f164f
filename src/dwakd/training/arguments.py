"""Check that training arguments suit this process and the data set."""

import os
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from dwakd.data.encoded import EncodedPairs
from dwakd.errors import UserError
from dwakd.recipe.training import DistillConfig


def checked_args(args: Any, teachers: Any = None) -> DistillConfig:
    """Return the training arguments, or raise UserError if this process cannot train with them and these teachers."""
    args = args or DistillConfig()
    if not isinstance(args, DistillConfig):
        raise UserError(f"args must be a dwakd.DistillConfig, which takes every option of {type(args).__name__}")
    listed = teachers if isinstance(teachers, list) else [teachers]
    if (args.teacher_model_init_kwargs or {}).get("device_map") or any(hasattr(one, "hf_device_map") for one in listed):
        args._n_gpu = min(args.n_gpu, 1)  # the teacher is on the other GPUs
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process: start one for each with torchrun "
            f"--nproc-per-node={args.n_gpu}, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.fp16 and args.device.type == "cpu":
        raise UserError("training.fp16 has no effect without a GPU: leave it out, or set training.bf16")
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes != args.world_size:
        raise UserError(
            f"{processes} processes were started (WORLD_SIZE), but each of them would train alone: set training.use_cpu=true "
            "on machines without a GPU, or start one process"
        )
    if args.accelerator_config.dispatch_batches:
        raise UserError("accelerator_config.dispatch_batches cannot be used: each process makes its own batches")
    check_schedule(args)
    return args


def check_schedule(args: DistillConfig) -> None:
    """Raise UserError if the optimiser or the schedule cannot be built."""
    if args.deepspeed:  # the DeepSpeed config defines the optimiser
        return
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    steps = max(args.max_steps, 1)
    option = "optim"
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.ParameterList([weight]))
        optimizer = optimizer_class([weight], **options)
        option = "lr_scheduler_type"
        warmup, own = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=own)
    except Exception as error:  # many packages raise exceptions of their own types
        fix = "; set training.lr_scheduler_kwargs" if option == "lr_scheduler_type" else ""
        raise UserError(f"training.{option}: {' '.join(str(error).split())}{fix}") from error


def check_batches(pairs: EncodedPairs | None, args: DistillConfig) -> None:
    """Raise UserError if `dataloader_drop_last` would leave out the only batch."""
    size = args.train_batch_size * args.world_size
    if pairs is not None and args.dataloader_drop_last and len(pairs) < size:
        raise UserError(
            f"the {len(pairs)} rows to train on are fewer than a batch of {size}, which training.dataloader_drop_last "
            "leaves out: lower training.per_device_train_batch_size, or set training.dataloader_drop_last=false"
        )
