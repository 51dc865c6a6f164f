"""Tiny teachers that end some of their answers, and recipes with prompts for them."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from dwakd.recipe.recipe import Recipe, recipe_from_dict
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model
from tests.training.builders import COLOURS, NOUNS

TOKENIZER = bpe_byte_fallback()
PROMPTS = [f"Name a colour that goes with {noun}{mark}" for mark in (".", "!", " now?") for noun in NOUNS][:40]
LABELLED = [
    {"prompt": f"Is the {noun} {colour}?", "response": f"The {noun} is {colour}."}
    for noun, colour in zip(NOUNS[:6], COLOURS[:6], strict=True)
]


def teacher(end_bias: float = 5.5, **overrides: Any) -> PreTrainedModel:
    """Return a random Phi, whose head has a bias. The larger that of the end token is, the earlier answers end."""
    model = tiny_model("phi", len(TOKENIZER), **overrides)
    with torch.no_grad():
        model.lm_head.bias[TOKENIZER.eos_token_id] += end_bias
    return model


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write a jsonl file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def make_folder(folder: Path, **teacher_options: Any) -> dict[str, Any]:
    """Save a student, a teacher, labelled rows and 40 prompts; return the content of recipe.yaml, which uses them."""
    model, tokenizer = tiny_model("llama", len(byte_bpe())), byte_bpe()
    for name, one, own in (("student", model, tokenizer), ("teacher", teacher(**teacher_options), TOKENIZER)):
        one.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    content = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"train": write_rows(folder / "labelled.jsonl", LABELLED), "template": "plain"},
        "generate": {
            "prompts": [write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])],
            "output": str(folder / "answers.jsonl"),
            "temperature": 1.0,
            "max_new_tokens": 12,
        },
        "loss": {"method": "sft"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return content


def changed(content: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    """Return a recipe with these options changed; those that are None are left out."""
    merged = dict(content)
    for name, options in sections.items():
        both = {**content.get(name, {}), **options}
        merged[name] = {key: value for key, value in both.items() if value is not None}
    return recipe_from_dict(merged, "generate")
