"""The parameter groups of the optimiser: the maps between the models have a learning rate of their own."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from dwakd.errors import UserError
from dwakd.recipe.training import DistillConfig


def parameter_groups(distiller: nn.Module, decayed: set[str], args: DistillConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters of student and loss. Those named in `decayed` get weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            of_student = "student" in name.split(".")[:2]  # a wrapper may add one word in front
            rate = args.learning_rate if of_student else args.projector_learning_rate
            decay = args.weight_decay if name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def check_optimizer(args: DistillConfig) -> None:
    """Build optimiser and schedule for one number, to find wrong options before the models are loaded.

    Raises:
        UserError: a package is not installed, or the optimiser or the schedule refuses its options.
    """
    if args.deepspeed:  # its own file defines them
        return
    weight = nn.Parameter(torch.zeros(1, 1))
    steps = max(args.max_steps, 1)
    option = "optim"
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, nn.ParameterList([weight]))
        optimizer = optimizer_class([weight], **options)
        option = "lr_scheduler_type"
        warmup, own = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=own)
    except Exception as error:  # many packages raise exceptions of their own types
        raise UserError(f"training.{option}: {' '.join(str(error).split())}") from error
