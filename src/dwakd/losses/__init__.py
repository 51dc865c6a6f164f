"""The distillation methods. CONTRIBUTING.md says how to add one."""

from typing import Any

from dwakd.errors import UserError
from dwakd.losses.alm import AlmLoss
from dwakd.losses.base import DistillationLoss
from dwakd.losses.cdm import CdmLoss
from dwakd.losses.dskd import DskdLoss
from dwakd.losses.dskd_v2 import DskdV2Loss
from dwakd.losses.dwa_kd import DwaKdLoss
from dwakd.losses.dwa_kd_v2 import DwaKdV2Loss
from dwakd.losses.gold import GoldLoss
from dwakd.losses.kd import KdLoss
from dwakd.losses.methods import METHODS
from dwakd.losses.min_ed import MinEdLoss
from dwakd.losses.multilevel_ot import MultiLevelOtLoss
from dwakd.losses.options import MethodOptions
from dwakd.losses.pair import ModelPair, Widths
from dwakd.losses.scale import TeacherScale
from dwakd.losses.several_teachers import SeveralTeachers
from dwakd.losses.sft import SftLoss
from dwakd.losses.simct import SimctLoss
from dwakd.losses.sra import SraLoss
from dwakd.losses.uld import UldLoss
from dwakd.losses.weighted_sum import SUM, WeightedSumLoss
from dwakd.losses.x_token import XTokenLoss
from dwakd.validation import parse, unknown_name

__all__ = [
    "METHODS",
    "SUM",
    "AlmLoss",
    "CdmLoss",
    "DistillationLoss",
    "DskdLoss",
    "DskdV2Loss",
    "DwaKdLoss",
    "DwaKdV2Loss",
    "GoldLoss",
    "KdLoss",
    "MethodOptions",
    "MinEdLoss",
    "ModelPair",
    "MultiLevelOtLoss",
    "SeveralTeachers",
    "SftLoss",
    "SimctLoss",
    "SraLoss",
    "TeacherScale",
    "UldLoss",
    "WeightedSumLoss",
    "Widths",
    "XTokenLoss",
    "build_loss",
    "method_class",
    "method_options",
]


def method_class(method: str) -> type[DistillationLoss[Any]]:
    """Return the class of a method, or raise UserError with the valid names."""
    known: dict[str, type[DistillationLoss[Any]]] = {**METHODS, SUM: WeightedSumLoss}
    if method not in known:
        raise unknown_name(f"method {method!r}", method, list(known))
    return known[method]


def method_options(method: str, values: dict[str, Any] | None = None, prefix: str = "loss.") -> MethodOptions:
    """Validate the options of a method. In messages, the name of an option begins with `prefix`.

    Raises:
        UserError: the method or an option is unknown, or the value of an option is not allowed.
    """
    return parse(method_class(method).options_type, values or {}, prefix)


def build_loss(
    method: str, options: dict[str, Any] | None = None, *, widths: Widths | None = None, pair: ModelPair | None = None
) -> DistillationLoss[Any]:
    """Build the loss of a method from its options, and from the widths or the pair of models if it needs them.

    Raises:
        UserError: as `method_options`; or what the method needs of the models is missing or does not fit it.
    """
    needs = method_options(method, options).needs_models
    models = {needs: {"widths": widths, "pair": pair}[needs]} if needs else {}
    if None in models.values():
        how = {"widths": "model_widths", "pair": "model_pair"}
        raise UserError(f"method {method} needs the argument {needs}: pass dwakd.{how[str(needs)]}(...)")
    try:
        return method_class(method)(**models, **(options or {}))
    except ValueError as error:
        raise UserError(f"method {method}: {error}") from error
