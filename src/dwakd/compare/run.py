"""Run the cells of a comparison as separate processes; finished cells are kept, and failures are reported."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dwakd.compare.plan import Cell, Variant, search_of
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import Recipe
from dwakd.training.run_folder import RUN_FILE, check_same_recipe

MOVABLE = re.compile(r"teacher\.(\d+\.)?cache$")
"""Options that may differ between finished runs, because they only name a folder."""
_STEPS = re.compile(rb"(\d+)/(\d+) \[")


class Runner:
    """Starts `dwakd train` for each cell.

    Args:
        recipe: the recipe from which every cell is derived.
        folder: folder for recipes/NAME.yaml, cells/NAME (the folder of a run) and logs/NAME.log.
        jobs: number of processes at a time.
    """

    def __init__(self, recipe: Recipe, folder: Path, jobs: int) -> None:
        self.recipe = recipe
        self.folder = folder
        self.jobs = jobs
        self._processes: list[subprocess.Popen[bytes]] = []
        for name in ("recipes", "cells", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def finished(self, cell: Cell) -> bool:
        """Return whether a run is finished, including its evaluation."""
        folder = self.cell_folder(cell)
        tests = 0 if cell.search else len(self.recipe.evaluation.test)
        return (folder / RUN_FILE).is_file() and len(list((folder / "eval").glob("*.json"))) >= tests

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Run the cells that are not finished and return the reason of each failure, by the name of the cell.

        Raises:
            UserError: a finished run was made with another recipe.
        """
        waiting = [cell for cell in cells if not self.finished(cell)]
        for cell in cells:
            saved = self.cell_folder(cell) / RECIPE_FILE
            if cell not in waiting and saved.is_file():
                check_same_recipe(saved, cell.recipe(self.recipe), changeable=MOVABLE)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *times, console=Console(stderr=True)) as bar, ThreadPoolExecutor(self.jobs) as pool:
            task = bar.add_task("runs", total=len(cells), completed=len(cells) - len(waiting))

            def run_one(cell: Cell) -> str | None:
                reason = self._run_cell(cell, bar)
                bar.advance(task)
                return reason

            try:
                reasons = list(pool.map(run_one, waiting))
            except BaseException:  # Ctrl-C: stop the running cells and keep the finished ones
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._processes:
                    process.terminate()
                raise
        return {cell.name: reason for cell, reason in zip(waiting, reasons, strict=True) if reason is not None}

    def _run_cell(self, cell: Cell, bar: Progress) -> str | None:
        """Run one cell and return the reason if it failed."""
        path = self.folder / "recipes" / f"{cell.name}.yaml"
        path.write_text(cell.recipe(self.recipe).dump(), encoding="utf-8")
        log = self.folder / "logs" / f"{cell.name}.log"
        task = bar.add_task(f"  {cell.name}", total=None)
        with log.open("wb") as stream:
            command = train_command(path, self.cell_folder(cell))
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            self._processes.append(process)
            while process.poll() is None:
                steps = _STEPS.findall(log.read_bytes()[-2000:])
                if steps:  # the last "12/150 [" in the log
                    bar.update(task, completed=int(steps[-1][0]), total=int(steps[-1][1]))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
        bar.remove_task(task)
        return None if process.returncode == 0 else failure_reason(log, process.returncode)


def train_command(recipe: Path, folder: Path) -> list[str]:
    """Return the command that trains and evaluates a cell, or continues it if its folder exists."""
    resume = ["--resume"] if folder.exists() else []
    return [sys.executable, "-m", "dwakd", "train", str(recipe), "--output", str(folder), *resume]


def failure_reason(log: Path, code: int) -> str:
    """Return the last error in the log of a run, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return f"{last.removeprefix('error: ')} ({log})"


def search(runner: Runner, variants: list[Variant], seed: int) -> tuple[list[Variant], dict[str, str]]:
    """Return each variant with the best learning rate and weight on the dev set, unchanged if its search failed."""
    tried = [[Cell(item, seed, search=True) for item in search_of(variant)] for variant in variants]
    failures = runner.run([cell for cells in tried for cell in cells])
    chosen = []
    for variant, cells in zip(variants, tried, strict=True):
        done = [cell for cell in cells if runner.finished(cell)]
        best = min(done, key=lambda cell: _dev_loss(runner.cell_folder(cell))).variant if done else variant
        chosen.append(replace(best, name=variant.name))
    return chosen, failures


def _dev_loss(folder: Path) -> float:
    """Return what the search minimises: the negative best ROUGE-L on the dev set, or else the best bits per byte."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    for name, sign in (("eval_rouge_l", -1), ("eval_bits_per_byte", 1)):
        if values := [sign * entry[name] for entry in history if name in entry]:
            return min(values)
    raise AssertionError(f"{folder} was never evaluated")
