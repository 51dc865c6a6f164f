"""From a model's name and test files to scores on disk and a table: what `dwakd eval` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from dwakd.config import RECIPE_FILE, Recipe, read_saved_recipe
from dwakd.data.encoding import TextEncoder
from dwakd.evaluation.evaluate import Evaluation, evaluate_model, evaluation_signature
from dwakd.evaluation.generate import answerable_prompts
from dwakd.evaluation.report import check_overwrite, evaluation_table, write_evaluation
from dwakd.evaluation.sets import EvaluationSet, check_evaluation
from dwakd.evaluation.signature import data_identity, model_identity
from dwakd.folders import check_output_folder
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.models.rows import check_head


def evaluate_sets(
    model: str,
    data: list[str],
    *,
    output: Path | None,
    template: str | None,
    bos: str | None,
    special_tokens_in_prompts: str | None,
    adapter: str | None,
    columns: dict[str, Any],
    limit: int | None,
    overwrite: bool,
    **options: Any,
) -> Group:
    """Evaluate a model on each test set; writes SET.json and SET.answers.jsonl and returns what to print.

    Args:
        overwrite: replace results of the same name that have another signature; else they are refused.
        options: num_seeds, greedy, temperature, top_p, max_new_tokens and batch_size.

    Raises:
        UserError: an option out of range, anything in model or data that a user can mend, or results in the way.
    """
    recipe = Path(model) / RECIPE_FILE
    mend = "restore it, or remove it and give --template and --bos"
    shown = read_saved_recipe(recipe, mend=mend)["data"] if recipe.is_file() else {}
    folder = output or (Path(model) / "eval" if Path(model).is_dir() else Path("eval") / Path(model).name)
    check_output_folder(folder)
    checked = {name: options[name] for name in ("num_seeds", "max_new_tokens", "batch_size")}
    sets = check_evaluation(data, columns=columns, limit=limit, **checked)
    encoder = TextEncoder(
        load_tokenizer(model),
        template or shown.get("template", "alpaca"),
        bos or shown.get("bos", "auto"),
        special_tokens_in_prompts or shown.get("special_tokens_in_prompts", "parse"),
    )
    loaded = load_causal_lm(model, adapter=adapter)
    check_head(loaded)
    check_room(loaded, encoder, sets)
    return _evaluate_all(loaded, encoder, sets, folder, model, options, overwrite=overwrite)


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


def check_room(model: Any, encoder: TextEncoder, sets: list[EvaluationSet]) -> None:
    """Refuse test sets with a prompt that the model has no room to answer; it may precede the training.

    Raises:
        UserError: as said; names the set and the row.
    """
    for item in sets:
        answerable_prompts(model, encoder, item.examples, item.source)


def evaluate_recipe(recipe: Recipe, model: Any, encoder: TextEncoder, folder: Path) -> Group:
    """Evaluate a student just trained on the test sets of its recipe; the folder's eval/ is the run's to write."""
    section = recipe.evaluation
    options = {
        "num_seeds": section.seeds,
        "greedy": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": section.max_new_tokens,
        "batch_size": section.batch_size,
    }
    sets = check_recipe_evaluation(recipe)
    return _evaluate_all(model, encoder, sets, folder / "eval", str(folder), options, overwrite=True)


def _evaluate_all(
    model: Any,
    encoder: TextEncoder,
    sets: list[EvaluationSet],
    folder: Path,
    name: str,
    options: dict[str, Any],
    *,
    overwrite: bool,
) -> Group:
    options["seeds"] = [10 * (index + 1) for index in range(options.pop("num_seeds"))]
    weights = model_identity(model, name)
    identities = [{"model": weights, "data": data_identity(item.examples, item.source)} for item in sets]
    if not overwrite:
        signed = {option: value for option, value in options.items() if option != "batch_size"}
        for item, identity in zip(sets, identities, strict=True):
            signature = evaluation_signature(model, encoder, item.examples, identity=identity, **signed)
            check_overwrite(folder / f"{item.name}.json", signature)
    rows: dict[str, Evaluation] = {}
    for item, identity in zip(sets, identities, strict=True):
        rows[item.name] = evaluate_model(model, encoder, item.examples, identity=identity, **options)
        write_evaluation(rows[item.name], folder / f"{item.name}.json", folder / f"{item.name}.answers.jsonl")
    where = Text(f"answers, and numbers with their whole signature: {folder}", no_wrap=True, overflow="ignore")
    return Group(evaluation_table(rows), where)
