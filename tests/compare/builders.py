"""Build a recipe with a section `compare`, whose files do not exist."""

from typing import Any

from dwakd.recipe.recipe import Recipe, recipe_from_dict

CONTENT = {
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": "train.jsonl"},
    "loss": {"method": "dwa_kd", "temperature": 3.0},
    "training": {"learning_rate": 1e-3},
    "evaluation": {"test": ["test.jsonl"]},
    "compare": {"methods": ["sft", "dskd", "dwa_kd"], "seeds": [1, 2], "options": {"dskd": {"kd_rate": 0.3}}},
}


def recipe(**changes: Any) -> Recipe:
    return recipe_from_dict({**CONTENT, **changes}, "compare")
