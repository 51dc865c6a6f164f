"""Train several rows of a comparison with several seeds and compare them in a table: the work of `dwakd compare`.

Each run is a separate process. Finished runs are kept, and failures are reported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from dwakd.answers.run import answer_recipe
from dwakd.cache.fingerprint import json_digest
from dwakd.compare.plan import Cell, Variant, cacheable, search_of, sft_row, variants_of
from dwakd.compare.table import CellScores, comparison_tables, num_evaluated, read_cell, summarise_comparison
from dwakd.errors import UserError
from dwakd.evaluation.generate import progress_bar
from dwakd.evaluation.run import EvaluationPlan, evaluate_sets, plan_evaluation
from dwakd.folders import check_output_folder, write_file, write_json
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import CompareSection, TeacherSection
from dwakd.training.cache_run import cache_recipe
from dwakd.training.run import check_options
from dwakd.training.run_folder import RUN_FILE, check_same_recipe

KNOWN = re.compile(r"recipes$|cells$|teacher-cache|answers(-[0-9a-f]{8})?\.parts$")
"""Names in the folder of a comparison; an unfinished one contains at least one of them."""
MOVABLE = re.compile(r"(teacher\.(\d+\.)?cache|generate\.(output|batch_size))$")
"""Options that may differ between finished runs, because they only name a file or change the speed."""


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
            set for a search, or a method or transformers does not accept an option.
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
    runner = Runner(recipe, folder, jobs)
    rows = [runner.recipe(Cell(variant, seeds[0])) for variant in variants]
    for variant, row in zip(variants, rows, strict=True):
        with variant.named():
            check_options(row, folder)
    plan = _plan(recipe)
    _answer_prompts(rows, plan)
    with_teacher = [row for row in rows if row.loss.needs_teacher]
    _build_caches(with_teacher)
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
            scores[name] = [evaluate_teacher(plan, teacher, folder / "cells" / name.replace(" ", "-"))]
        except (UserError, RuntimeError, OSError) as error:  # the comparison of the students is still useful
            failures[name] = str(error)
    finished = [cell for cell in cells if runner.finished(cell)]
    for variant in variants:
        scores[variant.name] = [read_cell(runner.cell_folder(cell)) for cell in finished if cell.variant == variant]
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


def _with_answers(row: Recipe, recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a row, with another file of answers if the row changes what the teacher answers."""
    content, output = _answered_content(row), row.generate.output
    if content == _answered_content(recipe) or output != recipe.generate.output:
        return row
    output = str(folder / f"answers-{json_digest(content)[:8]}.jsonl")
    return row.replace(generate=row.generate.model_copy(update={"output": output}))


def _answered_content(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a recipe that determine the teacher's answers."""
    reading = {"train", "prompt", "response", "input", "teacher_prompt", "supervise", "template", "bos"}
    data = recipe.data.model_dump(include=reading | {"special_tokens_in_prompts", "invalid_rows", "limit"})
    teachers = [one.model_dump(exclude={"cache", "cache_dtype", "weight"}) for one in recipe.teachers[:1]]
    return {
        "data": data,
        "teachers": teachers,
        "generate": recipe.generate.model_dump(exclude={"output", "batch_size"}),
    }


def _with_shared_caches(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with a cache for each teacher, which the rows that change neither data nor models share."""
    names = ["teacher-cache", *(f"teacher-cache-{number}" for number in range(2, len(recipe.teachers) + 1))]
    pairs = zip(recipe.teachers, names, strict=False)
    teachers = [one.model_copy(update={"cache": one.cache or str(folder / name)}) for one, name in pairs]
    return recipe.model_copy(
        update={"teacher": teachers if isinstance(recipe.teacher, list) else next(iter(teachers), None)}
    )


def _with_caches(row: Recipe, recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a row with a cache for each teacher, which all rows with the same data and models share."""
    if not row.loss.needs_teacher or not cacheable(row):
        return row
    content, common = _cached_content(row), _cached_content(recipe)
    digest = "" if content == common else "-" + json_digest(content)[:8]
    shared = {one.cache for one in recipe.teachers} if digest else set()
    teachers = []
    for number, one in enumerate(row.teachers, start=1):
        name = f"teacher-cache{digest}" + (f"-{number}" if number > 1 else "")
        cache = one.cache if one.cache not in {None, *shared} else str(folder / name)
        teachers.append(one.model_copy(update={"cache": cache}))
    return row.replace(teacher=teachers)


def _build_caches(rows: list[Recipe]) -> None:
    """Build the caches of the rows, each of them once."""
    for row in {tuple(one.cache for one in row.teachers): row for row in rows}.values():
        if any(one.cache for one in row.teachers):
            cache_recipe(row)


def _cached_content(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a recipe that determine what a teacher's cache contains."""
    content = recipe.model_dump(exclude={"generate": {"output", "batch_size"}})
    teachers = [one.model_dump(exclude={"cache", "weight"}) for one in recipe.teachers]
    return {name: content[name] for name in ("student", "data", "generate")} | {"teachers": teachers}


def _plan(recipe: Recipe) -> EvaluationPlan:
    """Read the test sets, which must have references."""
    plan = plan_evaluation(recipe)
    if not recipe.evaluation.test:
        raise UserError("compare needs test sets: set evaluation.test in the recipe")
    for item in plan.sets:
        if not item.scored:
            raise UserError(f"compare scores answers, but {item.source} has no references: choose another test set")
    return plan


def evaluate_teacher(plan: EvaluationPlan, teacher: TeacherSection, folder: Path) -> CellScores:
    """Evaluate a teacher on the test sets unless that is done, and return its scores."""
    if num_evaluated(folder) < len(plan.sets):
        data, text = ([item.source for item in plan.sets if item.is_text == is_text] for is_text in (False, True))
        loading: dict[str, Any] = teacher.model_dump(
            include={"adapter", "revision", "trust_remote_code", "chat_template_path"}
        )
        loading["dtype"] = getattr(torch, teacher.dtype)
        evaluate_sets(teacher.model, data, plan.rows, plan.options, text=text, output=folder / "eval", **loading)
    return read_cell(folder)


class Runner:
    """Run `dwakd train` for each cell, `jobs` at a time; write recipes/NAME.yaml, cells/NAME/ and logs/NAME.log."""

    def __init__(self, base: Recipe, folder: Path, jobs: int) -> None:
        self.base, self.folder, self.jobs = _with_shared_caches(base, folder), folder, jobs
        self._processes: list[subprocess.Popen[bytes]] = []

    def recipe(self, cell: Cell) -> Recipe:
        """Return the recipe of a cell, which names the file of the teacher's answers and the caches of its teachers."""
        row = _with_answers(cell.recipe(self.base), self.base, self.folder)
        return _with_caches(row, self.base, self.folder)

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def finished(self, cell: Cell) -> bool:
        """Return whether a run is finished, including its evaluation."""
        folder = self.cell_folder(cell)
        section = self.base.evaluation
        tests = 0 if cell.search else len(section.test) + len(section.text)
        return (folder / RUN_FILE).is_file() and num_evaluated(folder) >= tests

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Run the cells that are not finished and return the reason of each failure, by the name of the cell.

        Raises:
            UserError: a finished run was made with another recipe.
        """
        waiting = [cell for cell in cells if not self.finished(cell)]
        for cell in cells:
            saved = self.cell_folder(cell) / RECIPE_FILE
            if cell not in waiting and saved.is_file():
                check_same_recipe(saved, self.recipe(cell), changeable=MOVABLE)
        with progress_bar(disable=False) as bar, ThreadPoolExecutor(self.jobs) as pool:
            try:
                found = bar.track(pool.map(self._run_cell, waiting), total=len(waiting), description="runs")
                reasons = dict(zip([cell.name for cell in waiting], found, strict=True))
            except BaseException:  # Ctrl-C: stop the running cells and keep the finished ones
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._processes:
                    process.terminate()
                raise
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _environment(self) -> dict[str, str]:
        """Divide the cores among the runs; processes that share cores through more threads slow each other down."""
        if self.jobs == 1:
            return dict(os.environ)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, **os.environ}

    def _run_cell(self, cell: Cell) -> str | None:
        """Run one cell and return the reason if it failed."""
        path = self.folder / "recipes" / f"{cell.name}.yaml"
        write_file(path, self.recipe(cell).dump().encode())
        log = self.folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            command = train_command(path, self.cell_folder(cell))
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=self._environment())
            self._processes.append(process)
            process.wait()
        return None if process.returncode == 0 else failure_reason(log, process.returncode)


def train_command(recipe: Path, folder: Path) -> list[str]:
    """Return the command that trains and evaluates a cell, or continues it if its folder exists."""
    resume = ["--resume"] if folder.exists() else []
    return [sys.executable, "-m", "dwakd", "train", str(recipe), "--output", str(folder), *resume]


def failure_reason(log: Path, code: int) -> str:
    """Return the last error in the log of a run, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = ([line for line in lines if line.startswith("error:")] or lines or [f"exit code {code}"])[-1]
    return f"{last.removeprefix('error: ')} ({log})"


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
    raise AssertionError(f"{folder} was never evaluated")
