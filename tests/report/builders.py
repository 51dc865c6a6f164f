"""Folders of runs: one that `dwakd train` has written, and changed copies of it."""

import json
import shutil
from pathlib import Path

from dwakd.evaluation.run import evaluate_plan, plan_evaluation
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import load_recipe
from dwakd.training.run import train

HOSTILE = '</script><script>document.title = "run"</script><img src="https://example.org/a.png" onerror="alert(1)">'
RIGHT_TO_LEFT = "שלום עולם, \u202eمرحبا\u202c"
WEIGHTS = shutil.ignore_patterns("*.safetensors", "tokenizer*", "checkpoint-*")


def trained_run(workspace: Path, folder: Path) -> Path:
    """Train three steps, evaluate at two temperatures, and return the folder of the run."""
    options = [
        "training.max_steps=3",
        "training.term_gradient_steps=1",
        "training.save_strategy=steps",
        "training.save_steps=2",
    ]
    options += [
        f"evaluation.test=[{workspace / 'data.jsonl'}]",
        "evaluation.seeds=2",
        "evaluation.temperatures=[1.0, 0.7]",
    ]
    recipe = load_recipe(workspace / "recipe.yaml", [*options, "evaluation.max_new_tokens=4", "evaluation.limit=3"])
    plan = plan_evaluation(recipe)
    trainer = train(recipe, folder, plan)
    evaluate_plan(plan, trainer.student, trainer.student_encoder, folder / "eval", name=str(folder), overwrite=True)
    return folder


def copy_run(source: Path, folder: Path, *, method: str = "dwa_kd", text: str = "") -> Path:
    """Copy a run without its weights, with the name of another method, and with text added to its answers."""
    shutil.copytree(source, folder, ignore=WEIGHTS)
    path = folder / RECIPE_FILE
    path.write_text(path.read_text().replace("method: dwa_kd", f"method: {method}"))
    for path in (folder / "eval").glob("*.jsonl"):
        answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for answer in answers:
            answer["answer"] += text
        path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return folder


def comparison(source: Path, folder: Path, rows: dict[str, str], seeds: tuple[int, ...] = (1,), text: str = "") -> Path:
    """Make the folder of a comparison whose rows have these methods; the first row is named last in comparison.json."""
    for row, method in rows.items():
        for seed in seeds:
            name = f"{row.replace(' ', '_').replace('+', 'plus')}-{seed}"
            copy_run(source, folder / "cells" / name, method=method, text=text)
    summary = {
        "variants": {key: {} for key in [*list(rows)[1:], *list(rows)[:1]]},
        "failures": {"alm-1": f"no memory {HOSTILE}"},
    }
    (folder / "comparison.json").write_text(json.dumps(summary))
    return folder


def similarity_file(path: Path, students: list[str]) -> None:
    """Write a file as `dwakd similarity` does."""
    values = {"model": {}, "cosine": [0.1, 0.2, 0.4], "product": [0.01, 0.03, 0.02], "num_spans": [3, 4, 5]}
    path.write_text(
        json.dumps({"signature": {}, "data": {}, "teacher": {}, "students": dict.fromkeys(students, values)})
    )
