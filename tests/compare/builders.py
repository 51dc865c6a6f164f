"""Build a recipe with a section `compare`, whose files do not exist."""

from typing import Any

from dwakd.recipe.recipe import Recipe, recipe_from_dict

ROWS: dict[str, dict[str, Any]] = {
    "sft": {"loss.method": "sft"},
    "dskd": {"loss.kd_rate": 0.3, "loss.method": "dskd"},
    "dwa_kd": {"loss.dtw_weight": 0.1},
    "more data": {"loss.method": "sft", "data.train": "more.jsonl", "training.learning_rate": 2e-3},
    "dwa_kd + alm": {
        "loss": [{"method": "dwa_kd", "kd_weight": 0.1}, {"method": "alm", "weight": 0.5}],
        "data.train": "more.jsonl",
    },
}
CONTENT = {
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": "train.jsonl"},
    "loss": {"method": "dwa_kd", "temperature": 3.0},
    "training": {"learning_rate": 1e-3},
    "evaluation": {"test": ["test.jsonl"]},
    "compare": {"seeds": [1, 2], "rows": ROWS},
}


def recipe(**changes: Any) -> Recipe:
    return recipe_from_dict({**CONTENT, **changes}, "compare")
