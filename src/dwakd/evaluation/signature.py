"""Build the signature of an evaluation: everything that its numbers depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dwakd.data.sources import Example
from dwakd.evaluation.summary import RESAMPLES

_DIGITS = 16
_NAMES = ("name", "revision")


def model_identity(model: PreTrainedModel | PeftModel, name: str | None = None) -> dict[str, Any]:
    """Return the model's name, its hub revision (None for a folder) and the first 16 digits of its weights' SHA-256."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    revision = getattr(model.config, "_commit_hash", None)
    shown = name or model.config.name_or_path or type(model).__name__
    return {"name": shown, "revision": revision, "sha256": digest.hexdigest()[:_DIGITS]}


def data_identity(examples: Sequence[Example], name: str | None = None) -> dict[str, Any]:
    """Return the name of the rows, their number and the first 16 digits of the SHA-256 of their texts."""
    rows = [{key: value for key, value in asdict(example).items() if value is not None} for example in examples]
    digest = hashlib.sha256(json.dumps(rows, default=str).encode())
    return {"name": name or "rows in memory", "rows": len(examples), "sha256": digest.hexdigest()[:_DIGITS]}


def make_signature(**options: Any) -> dict[str, Any]:
    """Return the metric, the given options, the constants of the evaluation and the package versions."""
    packages = ("dwakd", "rouge-score", "torch", "transformers")
    return {
        "metric": "rougeL F1 x 100",
        "stemmer": True,
        **options,
        "top_k": 0,
        "sampling": "inverse CDF, one stream per seed and row",
        "bootstrap_resamples": RESAMPLES,
        "versions": {name: version(name) for name in packages},
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List what differs between two signatures, as "seeds 10/20 before, 10 now"; names of model and data may differ."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            inner = {name for name in (*before, *now) if before.get(name) != now.get(name)} - {*_NAMES}
            before, now = ({name: side.get(name) for name in sorted(inner)} for side in (before, now))
        if before != now:
            found.append(f"{key} {shown(before)} before, {shown(now)} now")
    return found


def shown(value: Any) -> str:
    """Format a value of a signature as one line of text."""
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return "/".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
