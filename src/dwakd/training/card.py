"""The model card of a distilled student."""

from pathlib import Path

import yaml

from dwakd.config import Recipe


def model_card(recipe: Recipe, name: str) -> str:
    """README.md of the student's folder: what it was made from and how, and how to load it."""
    teacher = "`, `".join(teacher.model for teacher in recipe.teachers) or "none"
    header = {"library_name": "transformers", "tags": ["dwakd", "knowledge-distillation", recipe.method]}
    if recipe.student.peft:
        header |= {"library_name": "peft", "base_model": recipe.student.model}
    loader = "AutoPeftModelForCausalLM" if recipe.student.peft else "AutoModelForCausalLM"
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {name}

Student `{recipe.student.model}`, teacher `{teacher}`, method `{recipe.method}`, data `{recipe.data.train}`, prompts by
the template `{recipe.data.template!r}`. The whole recipe and the versions of everything stand beside this file.

```python
from {header["library_name"]} import {loader}

model = {loader}.from_pretrained("{name}")
```
"""


def write_card(recipe: Recipe, folder: Path) -> None:
    (folder / "README.md").write_text(model_card(recipe, folder.name), encoding="utf-8")
