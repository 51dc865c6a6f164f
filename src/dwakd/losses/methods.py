"""The table of the methods."""

from typing import Any

from dwakd.losses.alm import AlmLoss
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
from dwakd.losses.sft import SftLoss
from dwakd.losses.simct import SimctLoss
from dwakd.losses.sra import SraLoss
from dwakd.losses.uld import UldLoss
from dwakd.losses.x_token import XTokenLoss

METHODS: dict[str, type[DistillationLoss[Any]]] = {
    "sft": SftLoss,
    "kd": KdLoss,
    "uld": UldLoss,
    "min_ed": MinEdLoss,
    "multilevel_ot": MultiLevelOtLoss,
    "alm": AlmLoss,
    "gold": GoldLoss,
    "x_token": XTokenLoss,
    "simct": SimctLoss,
    "sra": SraLoss,
    "cdm": CdmLoss,
    "dskd": DskdLoss,
    "dskd_v2": DskdV2Loss,
    "dwa_kd": DwaKdLoss,
    "dwa_kd_v2": DwaKdV2Loss,
}
