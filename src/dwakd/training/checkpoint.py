"""Load student and loss from a checkpoint, and find checkpoints that are incomplete."""

import json
import zipfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

LOSS_STATE = "distillation.safetensors"


def load_student(student: Any, folder: str | Path) -> None:
    """Load the weights (or the adapter) of a saved student in place. Each parameter keeps its own dtype."""
    if isinstance(student, PeftModel):
        (adapter,) = student.peft_config
        set_peft_model_state_dict(student, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter)
        return
    saved = type(student).from_pretrained(folder, dtype=widest_dtype(student))
    student.load_state_dict(saved.state_dict())


def widest_dtype(model: nn.Module) -> torch.dtype:
    """Return the narrowest dtype that holds every floating-point parameter of a model exactly."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return reduce(torch.promote_types, dtypes)


def load_checkpoint(student: nn.Module, loss: nn.Module, folder: str | Path) -> None:
    """Load the weights of student and loss from a checkpoint in place."""
    load_student(student, folder)
    loss.load_state_dict(load_file(Path(folder) / LOSS_STATE))


def checkpoint_fault(folder: Path, needed: Sequence[str]) -> str | None:
    """Return which file of a checkpoint is missing or damaged, or None. Weights are not read completely.

    `needed` are the names of files that a checkpoint contains beside the weights of the student or its adapter.
    """
    missing = [name for name in needed if not (folder / name).is_file()]
    weights = {path.name for path in folder.glob("*.safetensors")} - set(needed)
    if not weights or list(folder.glob("*.safetensors.tmp")):
        missing.append("model.safetensors (or adapter_model.safetensors)")
    if missing:
        return f"{missing[0]} is missing"
    damaged = [path.name for path in sorted(folder.iterdir()) if not ends_well(path)]
    return f"{damaged[0]} is damaged" if damaged else None


def ends_well(path: Path) -> bool:
    """Return whether a file exists and is complete. This finds truncated files of all types in a checkpoint."""
    try:
        if path.suffix in (".pt", ".pth"):
            return zipfile.is_zipfile(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = content["weight_map"].values() if path.name.endswith(".index.json") else ()
            return all((path.parent / name).is_file() for name in shards)
    except (SafetensorError, ValueError, LookupError, TypeError, FileNotFoundError):
        return False
    return True
