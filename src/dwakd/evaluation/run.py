"""Evaluate models on test sets, write scores to disk and show a table: the work of `dwakd eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from dwakd.config import RECIPE_FILE, Recipe, read_saved_recipe
from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.evaluation.evaluate import Evaluation, evaluate_model, evaluation_signature
from dwakd.evaluation.generate import answerable_prompts
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.evaluation.report import check_overwrite, evaluation_table, write_evaluation
from dwakd.evaluation.sets import EvaluationSet, read_test_sets
from dwakd.evaluation.signature import data_identity, model_identity
from dwakd.folders import check_output_folder
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.models.rows import check_head


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate, read and validated before a model is loaded.

    Args:
        sets: the test sets with their rows.
        options: options of the evaluation of each set.
    """

    sets: list[EvaluationSet]
    options: EvalOptions


def plan_evaluation(recipe: Recipe) -> EvaluationPlan:
    """Read the test sets of a recipe and validate its evaluation section; needs no model.

    Raises:
        UserError: as `read_test_sets`, or an option is out of range; the message names it as evaluation.NAME.
    """
    section, data = recipe.evaluation, recipe.data
    try:
        rows = RowOptions(prompt=data.prompt, response=data.response, input=data.input, limit=section.limit)
        options = EvalOptions(seeds=section.seeds, max_new_tokens=section.max_new_tokens, batch_size=section.batch_size)
    except UserError as error:
        raise UserError(f"evaluation.{error}") from error
    return EvaluationPlan(read_test_sets(section.test, rows), options)


def check_room(plan: EvaluationPlan, model: Any, encoder: TextEncoder) -> None:
    """Check that the model has room to answer every prompt of the test sets; called before the training.

    Raises:
        UserError: a prompt is empty or too long; the message names the set and the row.
    """
    for item in plan.sets:
        answerable_prompts(model, encoder, item.examples, item.source)


def evaluate_sets(
    model: str,
    data: list[str],
    rows: RowOptions,
    options: EvalOptions,
    *,
    adapter: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Group:
    """Evaluate a model on test sets, write SET.json and SET.answers.jsonl, and return the table to print.

    Args:
        model: folder, hub id or GGUF file of the model.
        data: files or hub ids of the test sets.
        rows: how to read the rows and turn them into prompts. The defaults of template, bos and
            special_tokens_in_prompts are those of the recipe in the model's folder, if there is one.
        options: options of the evaluation.
        adapter: a PEFT adapter to merge into the model.
        output: folder of the results; eval/ in the model's folder by default.
        overwrite: replace results of the same name with another signature, which are otherwise an error.

    Raises:
        UserError: the model or the data cannot be used, or there are other results in the output folder.
    """
    recipe = Path(model) / RECIPE_FILE
    mend = "restore it, or remove it and give --template and --bos"
    saved = read_saved_recipe(recipe, mend=mend)["data"] if recipe.is_file() else {}
    folder = output or (Path(model) / "eval" if Path(model).is_dir() else Path("eval") / Path(model).name)
    check_output_folder(folder)
    plan = EvaluationPlan(read_test_sets(data, rows), options)
    trained_with = {name: saved[name] for name in ("template", "bos", "special_tokens_in_prompts") if name in saved}
    encoder = TextEncoder(load_tokenizer(model), **rows.rendering(**trained_with))
    loaded = load_causal_lm(model, adapter=adapter)
    check_head(loaded)
    check_room(plan, loaded, encoder)
    return _evaluate_all(plan, loaded, encoder, folder, model, overwrite=overwrite)


def evaluate_student(plan: EvaluationPlan, model: Any, encoder: TextEncoder, folder: Path) -> Group:
    """Evaluate a student that was just trained; replaces earlier results in eval/ of its folder."""
    return _evaluate_all(plan, model, encoder, folder / "eval", str(folder), overwrite=True)


def _evaluate_all(
    plan: EvaluationPlan, model: Any, encoder: TextEncoder, folder: Path, name: str, *, overwrite: bool
) -> Group:
    weights = model_identity(model, name)
    identities = [{"model": weights, "data": data_identity(item.examples, item.source)} for item in plan.sets]
    if not overwrite:
        for item, identity in zip(plan.sets, identities, strict=True):
            signature = evaluation_signature(model, encoder, item.examples, plan.options, identity=identity)
            check_overwrite(folder / f"{item.name}.json", signature)
    rows: dict[str, Evaluation] = {}
    for item, identity in zip(plan.sets, identities, strict=True):
        rows[item.name] = evaluate_model(model, encoder, item.examples, plan.options, identity=identity)
        write_evaluation(rows[item.name], folder / f"{item.name}.json", folder / f"{item.name}.answers.jsonl")
    where = Text(f"answers and scores with their signature: {folder}", no_wrap=True, overflow="ignore")
    return Group(evaluation_table(rows), where)
