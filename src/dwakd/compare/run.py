"""Run the cells of a comparison as separate processes; finished cells are kept, and failures are reported."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dwakd.compare.plan import Cell
from dwakd.config import RECIPE_FILE, Recipe
from dwakd.training.run_folder import RUN_FILE, check_same_recipe

MOVABLE = re.compile(r"teacher\.(\d+\.)?cache$")
"""Options that may differ between finished runs, because they only name a folder."""
_STEPS = re.compile(rb"(\d+)/(\d+) \[")


class Runner:
    """Starts `dwakd train` for each cell under a folder, several at a time if asked.

    Args:
        recipe: the recipe from which every cell is derived.
        folder: folder for recipes/NAME.yaml, cells/NAME (the folder of a run) and logs/NAME.log.
        jobs: number of processes at a time.
    """

    def __init__(self, recipe: Recipe, folder: Path, jobs: int) -> None:
        self.recipe = recipe
        self.folder = folder
        self.jobs = jobs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = threading.Event()
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
        for cell in cells:
            saved = self.cell_folder(cell) / RECIPE_FILE
            if self.finished(cell) and saved.is_file():
                check_same_recipe(saved, cell.recipe(self.recipe), changeable=MOVABLE)
        waiting = [cell for cell in cells if not self.finished(cell)]
        failures: dict[str, str] = {}
        seconds: list[float] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task("runs", total=len(cells), completed=len(cells) - len(waiting), left="")
            pool = ThreadPoolExecutor(self.jobs)

            def run_one(cell: Cell) -> None:
                if self._stopped.is_set():
                    return
                started = time.monotonic()
                reason = self._run_cell(cell, bar)
                if reason is not None:
                    failures[cell.name] = reason
                seconds.append(time.monotonic() - started)
                left = fmean(seconds) * (len(waiting) - len(seconds)) / self.jobs
                bar.update(task, advance=1, left=f"about {left / 60:.0f} min left")

            try:
                for future in [pool.submit(run_one, cell) for cell in waiting]:
                    future.result()
            except BaseException:  # Ctrl-C: stop the running cells and keep the finished ones
                self._stopped.set()
                for process in list(self._processes.values()):
                    process.terminate()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        return failures

    def _run_cell(self, cell: Cell, bar: Progress) -> str | None:
        """Run one cell and return the reason if it failed."""
        path = self.folder / "recipes" / f"{cell.name}.yaml"
        path.write_text(cell.recipe(self.recipe).dump(), encoding="utf-8")
        log = self.folder / "logs" / f"{cell.name}.log"
        folder = self.cell_folder(cell)
        task = bar.add_task(f"  {cell.name}", total=None, left="")
        with log.open("wb") as stream:
            process = subprocess.Popen(train_command(path, folder), stdout=stream, stderr=subprocess.STDOUT)
            self._processes[cell.name] = process
            while process.poll() is None:
                _show_steps(log, bar, task)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
        bar.remove_task(task)
        del self._processes[cell.name]
        return None if process.returncode == 0 else failure_reason(log, process.returncode)


def train_command(recipe: Path, folder: Path) -> list[str]:
    """Return the command that trains and evaluates a cell, or continues it if its folder exists."""
    resume = ["--resume"] if folder.exists() else []
    return [sys.executable, "-m", "dwakd", "train", str(recipe), "--output", str(folder), *resume]


def _show_steps(log: Path, bar: Progress, task: object) -> None:
    """Update the bar of a cell from the last "12/150 [" in its log."""
    with log.open("rb") as stream:
        stream.seek(max(log.stat().st_size - 2000, 0))
        found = _STEPS.findall(stream.read())
    if found:
        bar.update(task, completed=int(found[-1][0]), total=int(found[-1][1]))  # type: ignore[arg-type]


def failure_reason(log: Path, code: int) -> str:
    """Return the last error in the log of a run, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return f"{last.removeprefix('error: ')} ({log})"


def dev_loss(folder: Path) -> float:
    """Return what the search minimises: the negative best ROUGE-L on the dev set, or else the best bits per byte."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    for name, sign in (("eval_rouge_l", -1), ("eval_bits_per_byte", 1)):
        values = [sign * entry[name] for entry in history if name in entry]
        if values:
            return min(values)
    raise AssertionError(f"{folder} was never evaluated")
