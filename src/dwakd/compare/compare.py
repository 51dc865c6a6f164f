"""Train several methods with several seeds from one recipe and compare them in a table: the work of `dwakd compare`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Group

from dwakd.compare.plan import Cell, variants_of
from dwakd.compare.run import Runner, search
from dwakd.compare.table import CellScores, comparison_tables, read_cell, summarise_comparison
from dwakd.errors import UserError
from dwakd.evaluation.options import RowOptions
from dwakd.evaluation.run import evaluate_sets, plan_evaluation
from dwakd.folders import check_output_folder
from dwakd.losses import method_options
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import CompareSection, TeacherSection
from dwakd.training.cache_run import cache_recipe
from dwakd.training.recipe import check_options


def compare_methods(
    recipe: Recipe, folder: Path, *, ablation: bool = False, lr_sweep: bool = False, jobs: int = 1
) -> tuple[Group, bool]:
    """Run every run that is not finished, write all numbers to comparison.json and return the tables.

    Args:
        recipe: its `compare` section names methods, training seeds and options of each method.
        folder: folder of the comparison. If it contains an unfinished one, that one is continued.
        ablation: compare the rows of the paper's table 3 instead of methods.
        lr_sweep: first choose the learning rate and the weight of distillation of every row on the dev set.
        jobs: number of runs at a time.

    Returns:
        The tables, and whether any run is finished.

    Raises:
        UserError: the folder contains something else, there is no test set or one without references, there is no dev
            set for a search, or a method or transformers does not accept an option.
    """
    check_output_folder(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {"cells", "teacher-cache"}:
        raise UserError(f"{folder} is not empty and contains no comparison: choose another folder with --output")
    section = recipe.compare or CompareSection()
    if lr_sweep and recipe.data.eval is None:
        raise UserError("--lr-sweep needs a dev set: set data.eval in the recipe")
    seeds = list(dict.fromkeys(section.seeds))
    if not seeds:
        raise UserError("compare.seeds is empty: set at least one training seed")
    variants = variants_of(recipe, section, ablation=ablation)
    cached = _with_teacher_caches(recipe, folder)
    for variant in variants:
        check_options(Cell(variant, seeds[0]).recipe(cached), folder)
    _check_test_sets(recipe)
    options = [method_options(variant.method, variant.options) for variant in variants]
    with_teacher = [item for item in options if item.needs_teacher]
    if not all(item.needs_attention for item in with_teacher):
        recipe = cached
        cache_recipe(recipe)
    runner = Runner(recipe, folder, jobs)
    failures: dict[str, str] = {}
    if lr_sweep:
        variants, failures = search(runner, variants, seeds[0])
    cells = [Cell(variant, seed) for seed in seeds for variant in variants]
    failures |= runner.run(cells)
    scores: dict[str, list[CellScores]] = {}
    for number, teacher in enumerate(recipe.teachers if with_teacher else [], start=1):
        name = "teacher" if number == 1 else f"teacher {number}"
        scores[name] = []
        try:
            scores[name] = [evaluate_teacher(recipe, teacher, folder / "cells" / name.replace(" ", "-"))]
        except (UserError, RuntimeError, OSError) as error:  # the comparison of the students is still useful
            failures[name] = str(error)
    finished = [cell for cell in cells if runner.finished(cell)]
    for variant in variants:
        scores[variant.name] = [read_cell(runner.cell_folder(cell)) for cell in finished if cell.variant == variant]
    summary = summarise_comparison(scores, failures)
    summary["chosen"] = {variant.name: dataclasses.asdict(variant) for variant in variants}
    (folder / "comparison.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return comparison_tables(summary), bool(finished)


def _with_teacher_caches(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with a cache for each teacher, which all runs share."""
    names = ["teacher-cache", *(f"teacher-cache-{number}" for number in range(2, len(recipe.teachers) + 1))]
    caches = [teacher.cache or str(folder / name) for teacher, name in zip(recipe.teachers, names, strict=True)]
    pairs = zip(recipe.teachers, caches, strict=True)
    return recipe.model_copy(update={"teacher": [one.model_copy(update={"cache": cache}) for one, cache in pairs]})


def _check_test_sets(recipe: Recipe) -> None:
    if not recipe.evaluation.test:
        raise UserError("compare needs test sets: set evaluation.test in the recipe")
    for item in plan_evaluation(recipe).sets:
        if not item.scored:
            raise UserError(f"compare scores answers, but {item.source} has no references: choose another test set")


def evaluate_teacher(recipe: Recipe, teacher: TeacherSection, folder: Path) -> CellScores:
    """Evaluate a teacher on the test sets unless that is done, and return its scores."""
    section = recipe.evaluation
    if len(list((folder / "eval").glob("*.json"))) < len(section.test):
        names = ("template", "bos", "special_tokens_in_prompts", "prompt", "response", "input")
        rows = RowOptions(limit=section.limit, **{name: getattr(recipe.data, name) for name in names})
        options = plan_evaluation(recipe).options
        evaluate_sets(teacher.model, section.test, rows, options, adapter=teacher.adapter, output=folder / "eval")
    return read_cell(folder)
