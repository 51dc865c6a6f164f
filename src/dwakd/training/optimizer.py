"""The groups of the optimiser: the maps between the models have a learning rate of their own."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from dwakd.errors import UserError
from dwakd.training.config import DistillConfig


def parameter_groups(distiller: nn.Module, decayed: set[str], args: DistillConfig) -> list[dict[str, Any]]:
    """The trainable parameters of student and loss, each with and without weight decay (`decayed`, by name)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            own = "student" not in name.split(".")[:2]  # a wrapper may put one word before
            groups.setdefault((own, name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": args.weight_decay if decay else 0.0,
            "lr": args.projector_learning_rate if own else args.learning_rate,
        }
        for (own, decay), parameters in groups.items()
    ]


def check_optimizer(args: DistillConfig) -> None:
    """Build optimiser and schedule for a module of one number: what they refuse would show only when training begins.

    Raises:
        UserError: a package that isn't installed, or options that the optimiser or the schedule refuses.
    """
    if args.deepspeed:  # its own file says what they are
        return
    weight = nn.Parameter(torch.zeros(1, 1))
    steps = max(args.max_steps, 1)
    option = "optim"
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, nn.ParameterList([weight]))
        optimizer = optimizer_class([weight], **options)
        option = "lr_scheduler_type"
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except Exception as error:  # a dozen packages raise what they like
        raise UserError(f"training.{option}: {' '.join(str(error).split())}") from error
