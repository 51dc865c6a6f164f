"""From a model's name and test files to scores on disk and a table: what `dwakd eval` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from dwakd.config import RECIPE_FILE, Recipe, parse_yaml
from dwakd.data.encoding import TextEncoder
from dwakd.evaluation.evaluate import Evaluation, evaluate_model
from dwakd.evaluation.report import evaluation_table, write_evaluation
from dwakd.evaluation.sets import EvaluationSet, check_evaluation
from dwakd.evaluation.signature import data_identity, model_identity
from dwakd.folders import check_output_folder
from dwakd.models.loading import load_causal_lm, load_tokenizer


def evaluate_sets(
    model: str,
    data: list[str],
    *,
    output: Path | None,
    template: str | None,
    adapter: str | None,
    columns: dict[str, Any],
    limit: int | None,
    num_seeds: int,
    **options: Any,
) -> Group:
    """Evaluate a model on each test set; writes SET.json and SET.answers.jsonl and returns what to print."""
    recipe = Path(model) / RECIPE_FILE
    shown = parse_yaml(recipe.read_text(encoding="utf-8"))["data"] if recipe.is_file() else {}
    folder = output or (Path(model) / "eval" if Path(model).is_dir() else Path("eval") / Path(model).name)
    check_output_folder(folder)
    checked = {name: options[name] for name in ("max_new_tokens", "batch_size")}
    sets = check_evaluation(data, columns=columns, limit=limit, num_seeds=num_seeds, **checked)
    encoder = TextEncoder(load_tokenizer(model), template or shown.get("template", "alpaca"), shown.get("bos", "auto"))
    loaded = load_causal_lm(model, adapter=adapter)
    return _evaluate_all(loaded, encoder, sets, folder, model_identity(loaded, model), num_seeds, options)


def check_recipe_evaluation(recipe: Recipe) -> list[EvaluationSet]:
    """The test sets of a recipe, read and checked; needs no model, so that it can precede the training.

    Raises:
        UserError: as `check_evaluation`; options are named evaluation.NAME.
    """
    section, data = recipe.evaluation, recipe.data
    return check_evaluation(
        section.test,
        columns={"prompt": data.prompt, "response": data.response, "input": data.input},
        limit=section.limit,
        num_seeds=section.seeds,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        prefix="evaluation.",
    )


def evaluate_recipe(recipe: Recipe, model: Any, encoder: TextEncoder, folder: Path) -> Group:
    """Evaluate a student just trained on the test sets of its recipe."""
    section = recipe.evaluation
    options = {"max_new_tokens": section.max_new_tokens, "batch_size": section.batch_size}
    identity = model_identity(model, str(folder))
    sets = check_recipe_evaluation(recipe)
    return _evaluate_all(model, encoder, sets, folder / "eval", identity, section.seeds, options)


def _evaluate_all(
    model: Any,
    encoder: TextEncoder,
    sets: list[EvaluationSet],
    folder: Path,
    model_digest: dict[str, Any],
    num_seeds: int,
    options: dict[str, Any],
) -> Group:
    seeds = [10 * (index + 1) for index in range(num_seeds)]
    rows: dict[str, Evaluation] = {}
    for item in sets:
        identity = {"model": model_digest, "data": data_identity(item.examples, item.source)}
        evaluation = evaluate_model(model, encoder, item.examples, seeds=seeds, identity=identity, **options)
        write_evaluation(evaluation, folder / f"{item.name}.json", folder / f"{item.name}.answers.jsonl")
        rows[item.name] = evaluation
    where = Text(f"answers, and numbers with their whole signature: {folder}", no_wrap=True, overflow="ignore")
    return Group(evaluation_table(rows), where)
