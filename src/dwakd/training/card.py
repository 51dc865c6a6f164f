"""Write the model card of a student: its origin, how to load it, the recipe, licences and what to cite."""

import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from peft import PeftModel
from torch import nn

from dwakd.data.sources import SUFFIXES
from dwakd.evaluation.card import CARD, RESULTS, has_section, put_section, read_card, update_results
from dwakd.folders import without_paths, write_file
from dwakd.losses import METHODS, SUM
from dwakd.models.head import model_name
from dwakd.recipe.training import DATA_OPTIONS, DistillConfig

PACKAGES = ("dwakd", "torch", "transformers", "tokenizers", "peft", "datasets", "accelerate", "numba")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def recipe_of(args: DistillConfig, student: Any, teachers: Any, data: Any, *, peft: bool) -> dict[str, Any]:
    """Return the arguments of a trainer as the sections of a recipe. Models in memory have the name of their class.

    Numbers of NumPy, which YAML cannot write, become those of Python.
    """
    given = teachers if isinstance(teachers, list) else [] if teachers is None else [teachers]
    names = ("lmbda", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size")
    sections = {
        "student": {"model": _named(student), "peft": peft or isinstance(student, PeftModel)},
        "teacher": [{"model": _named(one)} for one in given] if args.method_options.needs_teacher else [],
        "data": {"train": str(data) if isinstance(data, str | Path) else "rows in memory"}
        | {name: getattr(args, name) for name in DATA_OPTIONS},
        "loss": args.loss_options["losses"] if args.method == SUM else {"method": args.method, **args.loss_options},
        "training": {name: getattr(args, name) for name in names},
    }
    return dict(json.loads(json.dumps(sections, default=lambda value: value.item())))


def _named(model: Any) -> str:
    if not isinstance(model, str | nn.Module):  # a Teacher
        model = getattr(model, "name", None) or getattr(model, "model", model)
    if isinstance(model, str):
        return model
    name = model_name(model) if isinstance(model, nn.Module) else type(model).__name__
    return name if "/" in name else f"{name} in memory"


def write_card(recipe: dict[str, Any], folder: Path, name: str | None = None, **given: Any) -> None:
    """Write README.md, or update the parts of an existing one that dwakd has written.

    Args:
        recipe: the sections of the recipe.
        folder: the student's folder.
        name: title of a new card. Default: the name of the folder.
        **given: metadata of the Hugging Face Hub that replaces what is there.
    """
    path, student = folder / CARD, recipe["student"]["model"]
    title = name or folder.resolve().name
    card = read_card(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n# {title}\n")
    if card is None:
        return
    teacher = recipe.get("teacher") or []
    teachers = [one["model"] for one in (teacher if isinstance(teacher, list) else [teacher])]
    sources = [recipe["data"]["train"], *recipe.get("generate", {}).get("prompts", [])]
    hub = [found for found in map(_data_set, sources) if found]
    licences = {one: licence_of(one) for one in (student, *teachers)} | {one: licence_of(one, "dataset") for one in hub}
    library = "peft" if recipe["student"]["peft"] else "transformers"
    loss = recipe["loss"] if isinstance(recipe["loss"], list) else [recipe["loss"]]
    methods = [str(part["method"]) for part in loss]
    found = {"library_name": library, "pipeline_tag": "text-generation", "datasets": hub or None}
    if _HUB_ID.fullmatch(student) and not Path(student).exists():
        found |= {"base_model": student, "base_model_relation": "adapter" if library == "peft" else "finetune"}
    for key, value in {**found, "license": licences[student], **given}.items():
        if value is not None and (key in given or card.data.get(key) is None):
            card.data[key] = value
    tags = [*(card.data.get("tags") or []), "dwakd", "knowledge-distillation", *methods]
    card.data["tags"] = list(dict.fromkeys(tags))
    body = _body(recipe, teachers, methods, library, licences, folder.resolve().name)
    card.text = put_section(card.text, "training", body)
    if not has_section(card.text, RESULTS):
        card.text = put_section(card.text, RESULTS, "## Results\n\nNo test set has been evaluated with `dwakd eval`.")
    write_file(path, str(card).encode())
    update_results(folder)


def licence_of(source: str, kind: str = "model") -> str | None:
    """Return the licence that the card of a model or data set declares, in its folder or on the hub; None if unknown."""
    local = Path(source) / CARD
    if not Path(source).exists() and _HUB_ID.fullmatch(source):
        try:
            data: Any = getattr(HfApi().repo_info(source, repo_type=kind, timeout=10.0), "card_data", None)
            return data.get("license") if data else None
        except Exception:  # the hub and the network raise many unrelated types
            local = Path(str(try_to_load_from_cache(source, CARD, repo_type=kind)))
    card = read_card(local) if local.is_file() else None
    return card.data.get("license") if card else None


def _data_set(source: str) -> str | None:
    """Return the id of a data set on the hub; None for a file."""
    found = re.match(r"[\w-][\w.-]*/[\w.-]+(?=$|[:@])", source)
    is_file = Path(source).exists() or (":" not in source and Path(source.partition("@")[0]).suffix in SUFFIXES)
    return found[0] if found and not is_file else None


def _body(
    recipe: dict[str, Any], teachers: list[str], methods: list[str], library: str, licences: Any, folder: str
) -> str:
    public = without_paths(recipe)
    served = public.get("teacher") or []
    endpoint = public.get("generate", {}).get("endpoint") or {}
    for server in (endpoint, *(served if isinstance(served, list) else [served])):
        for name in ("base_url", "url"):
            server.pop(name, None)  # it may be internal
    data = f"`{public['data']['train']}`"
    if recipe["data"].get("responses") == "teacher":
        data += f" and the teacher's answers in `{public['generate']['output']}`"
    if share := recipe.get("training", {}).get("lmbda"):
        data += f" (training.lmbda {share:g}: the student itself answered this fraction of the prompts)"
    loader = "AutoPeftModelForCausalLM" if library == "peft" else "AutoModelForCausalLM"
    declared = [f"`{without_paths(source)}`: {licence}" for source, licence in licences.items() if licence]
    modules = {name: sys.modules[METHODS[name].__module__].__doc__ or "" for name in methods}
    papers = {name: re.search(r"arXiv (\d{4}\.\d{5})", text) for name, text in modules.items()}
    cited = "".join(f"- `{name}`: https://arxiv.org/abs/{found[1]}\n" for name, found in papers.items() if found)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return f"""This model is `{public["student"]["model"]}`, trained with dwakd: teacher \
`{"`, `".join(without_paths(teachers)) or "none"}`, method `{" + ".join(methods)}`, data {data}, \
prompt template `{recipe["data"]["template"]!r}`.

```python
from {library} import {loader}

model = {loader}.from_pretrained("{folder}")
```

## Training

The recipe below describes the training. To repeat it, run `dwakd train recipe.yaml`. Versions: {versions}, \
Python {platform.python_version()}. Declared licences of models and data: {"; ".join(declared) or "none"}.

<details><summary>Recipe</summary>

```yaml
{yaml.safe_dump(public, sort_keys=False, allow_unicode=True)}```

</details>

## Citation

{cited}- dwakd {metadata.version("dwakd")}: https://github.com/dwakd/dwakd"""
