"""What the numbers of an evaluation depend on: the signature that travels with them."""

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
    """Name, hub revision (None of a folder) and SHA-256 of the weights, its first 16 digits."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    revision = getattr(model.config, "_commit_hash", None)
    shown = name or model.config.name_or_path or type(model).__name__
    return {"name": shown, "revision": revision, "sha256": digest.hexdigest()[:_DIGITS]}


def data_identity(examples: Sequence[Example], name: str | None = None) -> dict[str, Any]:
    """Name, number of rows and SHA-256 of their texts, its first 16 digits."""
    rows = [{key: value for key, value in asdict(example).items() if value is not None} for example in examples]
    digest = hashlib.sha256(json.dumps(rows, default=str).encode())
    return {"name": name or "rows in memory", "rows": len(examples), "sha256": digest.hexdigest()[:_DIGITS]}


def make_signature(**options: Any) -> dict[str, Any]:
    """Metric, `options` and versions."""
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
    """What differs between two signatures, as "seeds 10/20 before, 10 now"; names of model and data don't count."""
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
    """A value of a signature in one line of text."""
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return "/".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
