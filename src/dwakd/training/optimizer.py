"""The groups of the optimiser: the maps between the models have a learning rate of their own."""

from typing import Any

from torch import nn

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
