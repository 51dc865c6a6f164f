"""Train several methods with several seeds from one recipe and compare them in a table: the work of `dwakd compare`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Group

from dwakd.compare.plan import Cell, Variant, search_of, variants_of
from dwakd.compare.run import Runner, dev_loss, failure_reason
from dwakd.compare.table import CellScores, comparison_tables, read_cell, summarise_comparison
from dwakd.config import CompareSection, Recipe, TeacherSection
from dwakd.errors import UserError
from dwakd.evaluation.run import plan_evaluation
from dwakd.folders import check_output_folder
from dwakd.losses import method_class, needs_attention
from dwakd.training.cache_run import cache_recipe
from dwakd.training.recipe import check_options

RESULTS = "comparison.json"
OWN_FOLDERS = ("cells", "teacher-cache")


def compare_methods(
    recipe: Recipe, folder: Path, *, ablation: bool = False, lr_sweep: bool = False, jobs: int = 1
) -> tuple[Group, bool]:
    """Run every run that is not finished, write all numbers to comparison.json and return the tables.

    Args:
        recipe: the recipe; its `compare` section names methods, training seeds and options of each method.
        folder: folder of the comparison. If it holds an unfinished one, that one is continued.
        ablation: compare the rows of the paper's table 3 instead of methods.
        lr_sweep: first choose the learning rate and the weight of distillation of every row on the dev set.
        jobs: number of runs at a time.

    Returns:
        The tables, and whether any run is finished.

    Raises:
        UserError: the folder holds something else, there is no test set or one without references, there is no dev
            set for a search, or a method or transformers does not accept an option.
    """
    check_output_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_dir() for name in OWN_FOLDERS):
        raise UserError(f"{folder} is not empty and holds no comparison: choose another folder with --output")
    section = recipe.compare or CompareSection()
    if lr_sweep and recipe.data.eval is None:
        raise UserError("--lr-sweep needs a dev set: set data.eval in the recipe")
    seeds = list(dict.fromkeys(section.seeds))
    if not seeds:
        raise UserError("compare.seeds is empty: set at least one training seed")
    variants = variants_of(recipe, section, ablation=ablation)
    for variant in variants:
        check_options(Cell(variant, seeds[0]).recipe(recipe), folder)
    _check_test_sets(recipe)
    with_teacher = any(method_class(variant.method).options_type.needs_teacher for variant in variants)
    if any(
        method_class(variant.method).options_type.needs_teacher and not needs_attention(variant.method, variant.options)
        for variant in variants
    ):
        recipe = _with_teacher_cache(recipe, folder)
    runner = Runner(recipe, folder, jobs)
    failures: dict[str, str] = {}
    if lr_sweep:
        variants, failures = _search(runner, variants, seeds[0])
    cells = [Cell(variant, seed) for seed in seeds for variant in variants]
    failures |= runner.run(cells)
    scores: dict[str, list[CellScores]] = {}
    for k, teacher in enumerate(recipe.teachers if with_teacher else [], start=1):
        name = "teacher" + (f" {k}" if k > 1 else "")
        scores[name] = _teacher(recipe, teacher, folder, name, failures)
    for cell in cells:
        done = [read_cell(runner.cell_folder(cell))] if runner.finished(cell) else []
        scores.setdefault(cell.variant.name, []).extend(done)
    summary = summarise_comparison(scores, failures)
    summary["chosen"] = {variant.name: dataclasses.asdict(variant) for variant in variants}
    (folder / RESULTS).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return comparison_tables(summary), any(runner.finished(cell) for cell in cells)


def _check_test_sets(recipe: Recipe) -> None:
    if not recipe.evaluation.test:
        raise UserError("compare needs test sets: set evaluation.test in the recipe")
    for item in plan_evaluation(recipe).sets:
        if not item.scored:
            raise UserError(f"compare scores answers, but {item.source} has no references: choose another test set")


def _with_teacher_cache(recipe: Recipe, folder: Path) -> Recipe:
    """Build or complete a cache for each teacher, once for all runs, and return the recipe that uses them."""
    folders = [folder / ("teacher-cache" + (f"-{k}" if k > 1 else "")) for k in range(1, len(recipe.teachers) + 1)]
    teachers = [
        dataclasses.replace(teacher, cache=teacher.cache or str(place))
        for teacher, place in zip(recipe.teachers, folders, strict=True)
    ]
    cached = dataclasses.replace(recipe, teacher=teachers)
    cache_recipe(cached)
    return cached


def _search(runner: Runner, variants: list[Variant], seed: int) -> tuple[list[Variant], dict[str, str]]:
    """Return each variant with the best learning rate and weight on the dev set, unchanged if its search failed."""
    tried = {variant.name: [Cell(item, seed, search=True) for item in search_of(variant)] for variant in variants}
    failures = runner.run([cell for cells in tried.values() for cell in cells])
    chosen = []
    for variant in variants:
        done = [cell for cell in tried[variant.name] if runner.finished(cell)]
        if done:
            best = min(done, key=lambda cell: dev_loss(runner.cell_folder(cell)))
            variant = dataclasses.replace(best.variant, name=variant.name)
        chosen.append(variant)
    return chosen, failures


def _teacher(
    recipe: Recipe, teacher: TeacherSection, folder: Path, name: str, failures: dict[str, str]
) -> list[CellScores]:
    """Return the teacher's own scores; if it cannot be evaluated, return none and add the reason to the failures."""
    place = name.replace(" ", "-")
    output = folder / "cells" / place
    section = recipe.evaluation
    if len(list((output / "eval").glob("*.json"))) < len(section.test):
        command = [sys.executable, "-m", "dwakd", "eval", teacher.model, "-o", str(output / "eval")]
        options = {
            "--adapter": teacher.adapter,
            "--template": recipe.data.template,
            "--bos": recipe.data.bos,
            "--special-tokens-in-prompts": recipe.data.special_tokens_in_prompts,
            "--prompt": recipe.data.prompt,
            "--response": recipe.data.response,
            "--input": recipe.data.input,
            "--limit": section.limit,
            "--seeds": section.seeds,
            "--max-new-tokens": section.max_new_tokens,
            "--batch-size": section.batch_size,
        }
        for option, value in options.items():
            command += [] if value is None else [option, str(value)]
        for test in section.test:
            command += ["--data", test]
        log = folder / "logs" / f"{place}.log"
        with log.open("wb") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            failures[name] = failure_reason(log, code)
            return []
    return [read_cell(output)]
