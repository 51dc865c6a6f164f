"""Distil a large language model into a small one whose tokenizer is different.

The public names are imported on first use, so that `import dwakd` and `dwakd --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwakd.data.collator import collate
    from dwakd.data.sources import load_examples
    from dwakd.errors import UserError
    from dwakd.losses import METHODS, DskdLoss, DskdV2Loss, DwaKdLoss, DwaKdV2Loss, SftLoss
    from dwakd.models.loading import load_causal_lm, load_tokenizer
    from dwakd.models.sides import encode_rows, model_pair, model_widths, paired_sides
    from dwakd.recipe.training import DistillConfig
    from dwakd.training.trainer import DistillTrainer

_SIDES = ("encode_rows", "model_pair", "model_widths", "paired_sides")
_LOSSES = ("METHODS", "DskdLoss", "DskdV2Loss", "DwaKdLoss", "DwaKdV2Loss", "SftLoss")
_HOMES = {
    **dict.fromkeys(_LOSSES, "dwakd.losses"),
    **dict.fromkeys(_SIDES, "dwakd.models.sides"),
    "DistillConfig": "dwakd.recipe.training",
    "DistillTrainer": "dwakd.training.trainer",
    "UserError": "dwakd.errors",
    "collate": "dwakd.data.collator",
    "load_causal_lm": "dwakd.models.loading",
    "load_examples": "dwakd.data.sources",
    "load_tokenizer": "dwakd.models.loading",
}

__all__ = [
    "METHODS",
    "DistillConfig",
    "DistillTrainer",
    "DskdLoss",
    "DskdV2Loss",
    "DwaKdLoss",
    "DwaKdV2Loss",
    "SftLoss",
    "UserError",
    "collate",
    "encode_rows",
    "load_causal_lm",
    "load_examples",
    "load_tokenizer",
    "model_pair",
    "model_widths",
    "paired_sides",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dwakd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
