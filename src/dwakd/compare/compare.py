"""Train several rows of a comparison with several seeds and compare them in a table: the work of `dwakd compare`.

Each run is a separate process. Finished runs are kept, and failures are reported.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group

from dwakd.answers.run import answer_recipe
from dwakd.answers.store import read_json
from dwakd.checksums import CHECKSUMS
from dwakd.compare.inputs import check_inputs
from dwakd.compare.plan import Cell, Variant, search_of, sft_row, variants_of
from dwakd.compare.runner import Runner, check_results, is_evaluated, only_one
from dwakd.compare.scores import CellScores, read_cell
from dwakd.compare.table import comparison_tables, summarise_comparison
from dwakd.errors import UserError
from dwakd.evaluation.run import EvaluationPlan, evaluate_sets, plan_evaluation
from dwakd.folders import check_output_folder, write_json
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import CompareSection, TeacherSection
from dwakd.training.cache_run import cache_recipe
from dwakd.training.run import check_options

KNOWN = re.compile(r"recipes$|cells$|locks$|teacher-cache|answers(-[0-9a-f]{8})?\.parts$")
"""Names in the folder of a comparison; an unfinished one contains at least one of them."""


def compare_methods(
    recipe: Recipe, folder: Path, *, ablation: bool = False, lr_sweep: bool = False, jobs: int = 1
) -> tuple[Group, bool]:
    """Run every run that is not finished, write all numbers to comparison.json and return the tables.

    Args:
        recipe: its `compare` section names methods or rows, and training seeds.
        folder: folder of the comparison. If it contains an unfinished one, that one is continued.
        ablation: compare the rows of the paper's table 3 instead.
        lr_sweep: first choose the learning rate and the weight of distillation of every row on the dev set.
        jobs: number of runs at a time.

    Returns:
        The tables, and whether any run is finished.

    Raises:
        UserError: the folder contains something else, there is no test set or one without references, there is no dev
            set or no evaluation for a search, or a method or transformers does not accept an option.
    """
    check_output_folder(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not any(map(KNOWN.match, names)):
        raise UserError(f"{folder} is not empty and contains no comparison: choose another folder with --output")
    section = recipe.compare or CompareSection()
    if lr_sweep and recipe.data.eval is None:
        raise UserError("--lr-sweep needs a dev set: set data.eval in the recipe")
    seeds = list(dict.fromkeys(section.seeds))
    if not seeds:
        raise UserError("compare.seeds is empty: set at least one training seed")
    variants = variants_of(recipe, section, ablation=ablation)
    recipe = _with_answer_file(recipe, folder)
    for variant in variants:
        with variant.named():
            if check_options(Cell(variant, seeds[0]).recipe(recipe), folder).eval_strategy == "no" and lr_sweep:
                raise UserError(
                    "--lr-sweep needs evaluations on data.eval: set training.eval_strategy to epoch or steps"
                )
    plan = _plan(recipe)
    sets = {item.name: item.digest for item in plan.sets}
    runner = Runner(recipe, folder, jobs, sets)
    rows = [runner.recipe(Cell(variant, seeds[0])) for variant in variants]
    with_teacher = [row for row in rows if row.loss.needs_teacher]
    with only_one(folder, "models, data, answers and caches"):
        check_inputs(folder, rows)
        _answer_prompts(rows, plan)
        _build_caches(with_teacher)
    failures: dict[str, str] = {}
    if lr_sweep:
        refuse_other_runs(runner, variants, seeds)
        variants, failures = search(runner, variants, seeds[0])
    cells = [Cell(variant, seed) for seed in seeds for variant in variants]
    failures |= runner.run(cells)
    scores: dict[str, list[CellScores]] = {}
    for number, teacher in enumerate([one for one in recipe.teachers if with_teacher and not one.url], start=1):
        name = "teacher" if number == 1 else f"teacher {number}"
        scores[name] = []
        try:
            with only_one(folder, f"evaluation of the {name}"):
                place = folder / "cells" / name.replace(" ", "-")
                scores[name] = [evaluate_teacher(plan, teacher, place, sets, date=recipe.data.template_date)]
        except (UserError, RuntimeError, OSError) as error:  # the comparison of the students is still useful
            failures[name] = str(error)
    finished = [cell for cell in cells if runner.finished(cell)]
    for variant in variants:
        scores[variant.name] = [
            read_cell(runner.cell_folder(cell), sets) for cell in finished if cell.variant == variant
        ]
    summary = summarise_comparison(scores, failures, sft_row(variants, recipe))
    summary["chosen"] = {variant.name: dataclasses.asdict(variant) for variant in variants}
    write_json(folder / "comparison.json", summary)
    return comparison_tables(summary), bool(finished)


def _with_answer_file(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with a file of the teacher's answers, which all runs share."""
    output = recipe.generate.output or str(folder / "answers.jsonl")
    return recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"output": output})})


def _answer_prompts(rows: Sequence[Recipe], plan: EvaluationPlan) -> None:
    """Let the teacher answer the prompts of the rows that train on its answers, unless that is done."""
    readers: dict[str | None, list[Recipe]] = {}
    for row in rows:
        if row.data.responses == "teacher":
            readers.setdefault(row.generate.output, []).append(row)
    for own in readers.values():
        answer_recipe(own[0], plan, readers=own)


def _build_caches(rows: list[Recipe]) -> None:
    """Build the caches of the rows, each of them once."""
    for row in {tuple(one.cache for one in row.teachers): row for row in rows}.values():
        if any(one.cache for one in row.teachers):
            cache_recipe(row)


def _plan(recipe: Recipe) -> EvaluationPlan:
    """Read the test sets, which must have references."""
    plan = plan_evaluation(recipe)
    if not recipe.evaluation.test:
        raise UserError("compare needs test sets: set evaluation.test in the recipe")
    for item in plan.sets:
        if not (item.is_text or item.scored):
            raise UserError(f"compare scores answers, but {item.source} has no references: choose another test set")
    return plan


def evaluate_teacher(
    plan: EvaluationPlan, teacher: TeacherSection, folder: Path, sets: Mapping[str, str], *, date: str | None = None
) -> CellScores:
    """Evaluate a teacher on the test sets unless that is done, and return its scores.

    Args:
        plan: the test sets.
        teacher: the teacher.
        folder: where its results are, or are written.
        sets: as in `Runner`.
        date: the date that chat templates print.
    """
    saved, options = folder / "teacher.json", plan.options.model_dump(exclude={"batch_size"})
    own = teacher.model_dump(exclude={"name", "weight", "cache", "cache_dtype"})
    about = {**own, "evaluation": options, "rows": plan.rows.model_dump(), "sets": dict(sets)}
    about |= {} if date is None else {"template_date": date}
    is_other = read_json(saved) != about
    if is_other or not is_evaluated(folder, sets):
        (folder / CHECKSUMS).unlink(missing_ok=True)
        data, text = ([item.source for item in plan.sets if item.is_text == is_text] for is_text in (False, True))
        reading = {"chat_template_path": teacher.chat_template_path, "template_date": date}
        more: dict[str, Any] = {**teacher.loading(), **reading, "overwrite": is_other}
        evaluate_sets(teacher.model, data, plan.rows, plan.options, text=text, output=folder / "eval", **more)
        write_json(saved, about)
    check_results(folder)
    return read_cell(folder, sets)


def refuse_other_runs(runner: Runner, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Raise UserError if a row was trained without a search, so with other options than a search may choose."""
    logs = runner.folder / "logs"
    for variant in variants:
        items = search_of(variant, runner.base)
        tried = [Cell(item, seed, search=True) for item in items for seed in seeds]
        trained = [
            runner.cell_folder(cell) for cell in (Cell(variant, seed) for seed in seeds) if runner.finished(cell)
        ]
        if trained and not any(runner.finished(cell) or (logs / f"{cell.name}.log").is_file() for cell in tried):
            raise UserError(f"{trained[0]} was trained without --lr-sweep: choose another folder with --output")


def search(runner: Runner, variants: list[Variant], seed: int) -> tuple[list[Variant], dict[str, str]]:
    """Return each variant with the best learning rate and weight on the dev set, unchanged if its search failed."""
    tried = [[Cell(item, seed, search=True) for item in search_of(variant, runner.base)] for variant in variants]
    failures = runner.run([cell for cells in tried for cell in cells])
    chosen = []
    for variant, cells in zip(variants, tried, strict=True):
        done = [cell for cell in cells if runner.finished(cell)]
        best = min(done, key=lambda cell: _dev_loss(runner.cell_folder(cell))).variant if done else variant
        chosen.append(dataclasses.replace(best, name=variant.name))
    return chosen, failures


def _dev_loss(folder: Path) -> float:
    """Return what the search minimises: the negative best ROUGE-L on the dev set, or else the best bits per byte."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    for name, sign in (("eval_rouge_l", -1), ("eval_bits_per_byte", 1)):
        if values := [sign * entry[name] for entry in history if name in entry]:
            return min(values)
    raise UserError(
        f"{folder} was never evaluated on the dev set: lower training.eval_delay, and choose another --output"
    )
