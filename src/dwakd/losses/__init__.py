"""The distillation methods. CONTRIBUTING.md says how to add one."""

import inspect
import typing
from typing import Any

from dwakd.errors import UserError
from dwakd.losses.alm import AlmLoss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss
from dwakd.losses.cdm import CdmLoss
from dwakd.losses.dskd import DskdLoss
from dwakd.losses.dskd_v2 import DskdV2Loss
from dwakd.losses.dwa_kd import DwaKdLoss
from dwakd.losses.dwa_kd_v2 import DwaKdV2Loss
from dwakd.losses.gold import GoldLoss
from dwakd.losses.kd import KdLoss
from dwakd.losses.min_ed import MinEdLoss
from dwakd.losses.multilevel_ot import MultiLevelOtLoss
from dwakd.losses.pair import ModelPair
from dwakd.losses.projectors import Widths
from dwakd.losses.several_teachers import SeveralTeachers
from dwakd.losses.sft import SftLoss
from dwakd.losses.sra import SraLoss
from dwakd.losses.uld import UldLoss
from dwakd.options import check_type
from dwakd.validation import unknown_option

METHODS: dict[str, type[DistillationLoss]] = {
    "sft": SftLoss,
    "kd": KdLoss,
    "uld": UldLoss,
    "min_ed": MinEdLoss,
    "multilevel_ot": MultiLevelOtLoss,
    "alm": AlmLoss,
    "gold": GoldLoss,
    "sra": SraLoss,
    "cdm": CdmLoss,
    "dskd": DskdLoss,
    "dskd_v2": DskdV2Loss,
    "dwa_kd": DwaKdLoss,
    "dwa_kd_v2": DwaKdV2Loss,
}

__all__ = [
    "METHODS",
    "AlmLoss",
    "CdmLoss",
    "DistillationLoss",
    "DskdLoss",
    "DskdV2Loss",
    "DwaKdLoss",
    "DwaKdV2Loss",
    "GoldLoss",
    "KdLoss",
    "MinEdLoss",
    "ModelPair",
    "MultiLevelOtLoss",
    "SeveralTeachers",
    "SftLoss",
    "SraLoss",
    "TeacherScale",
    "UldLoss",
    "Widths",
    "build_loss",
    "method_class",
    "method_options",
    "needs_attention",
]


def method_class(method: str, option: str = "loss.method") -> type[DistillationLoss]:
    """Return the class of a method.

    Args:
        method: name of the method.
        option: where the name comes from, for the message.

    Raises:
        UserError: the method is unknown. The message lists the valid names.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r} in {option}; valid ones: {', '.join(METHODS)}")
    return METHODS[method]


def method_options(method: str) -> dict[str, Any]:
    """Return the options of a method with their defaults."""
    parameters = inspect.signature(method_class(method)).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("widths", "pair")
    }


def build_loss(
    method: str,
    options: dict[str, Any] | None = None,
    *,
    widths: Widths | None = None,
    pair: ModelPair | None = None,
    section: str = "loss",
) -> DistillationLoss:
    """Build the loss of a method from its options.

    Args:
        method: name of the method.
        options: the method's options.
        widths: widths of the two models, for methods that need them.
        pair: vocabularies and heads of the two models, for methods that need them.
        section: section of the recipe that holds the options, for messages.

    Raises:
        UserError: the method or an option is unknown, or the value of an option is not allowed.
    """
    valid = method_options(method)
    options = options or {}
    hints = typing.get_type_hints(METHODS[method].__init__)
    for name, value in options.items():
        if name not in valid:
            raise unknown_option(f"{section}.{name} of method {method}", name, list(valid))
        check_type(hints[name], value, f"{section}.{name}")
    models: dict[str, Any] = {"widths": widths} if METHODS[method].needs_widths else {}
    if METHODS[method].needs_pair:
        models["pair"] = pair
    try:
        return METHODS[method](**models, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"options of method {method} in {section}: {error}") from error


def needs_attention(method: str, options: dict[str, Any]) -> bool:
    """Return whether a method with these options reads `ModelSide.attention`."""
    loss = build_loss(method, options, widths=Widths(1, 1, 1, 1), pair=ModelPair.smallest())
    return loss.needs_attention
