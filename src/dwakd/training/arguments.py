"""Check that training arguments suit this process and the data set."""

from typing import Any

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
    if args.accelerator_config.dispatch_batches:
        raise UserError("accelerator_config.dispatch_batches cannot be used: each process makes its own batches")
    return args


def check_batches(pairs: EncodedPairs | None, args: DistillConfig) -> None:
    """Raise UserError if `dataloader_drop_last` would leave out the only batch."""
    size = args.train_batch_size * args.world_size
    if pairs is not None and args.dataloader_drop_last and len(pairs) < size:
        raise UserError(
            f"the {len(pairs)} rows to train on are fewer than a batch of {size}, which training.dataloader_drop_last "
            "leaves out: lower training.per_device_train_batch_size, or set training.dataloader_drop_last=false"
        )
