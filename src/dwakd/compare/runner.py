"""Run the cells of a comparison as processes of `dwakd train`, alone or together with the same command on other machines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from dwakd.cache.fingerprint import json_digest
from dwakd.checksums import CHECKSUMS, checksum_fault, write_checksums
from dwakd.compare.plan import Cell, cacheable
from dwakd.errors import UserError
from dwakd.evaluation.generate import progress_bar
from dwakd.folders import LOCK_FILE, write_file
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import TeacherSection
from dwakd.training.interruption import INTERRUPTED
from dwakd.training.run_folder import RUN_FILE, check_same_recipe

logger = logging.get_logger(__name__)
POLL_SECONDS = 5.0
"""Time between two attempts to run cells that other processes have locked."""
_STOPPED = (INTERRUPTED, 130, *(-number for number in (signal.SIGTERM, signal.SIGINT)))
"""Exit codes of runs that a user or a scheduler has stopped. A killed run may have needed too much memory."""
MOVABLE = re.compile(r"(teacher\.(\d+\.)?cache|generate\.(output|batch_size)|evaluation\.(test|text))$")
"""Options that may differ between finished runs, because they name files whose content is compared, or change the speed."""


def lock_of(folder: Path, name: str) -> FileLock:
    """Return the lock of one part of a comparison. The operating system releases it if its process dies."""
    path = folder / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


@contextlib.contextmanager
def only_one(folder: Path, part: str) -> Iterator[None]:
    """Let one process after the other run the `with` block, among those that run the same comparison."""
    lock = lock_of(folder, part)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process of this comparison (%s)", part)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Runner:
    """Run `dwakd train` for each cell, `jobs` at a time; write recipes/NAME.yaml, cells/NAME/ and logs/NAME.log.

    Several processes, on one machine or on several with a shared folder, may run the same cells: each cell is locked while
    it runs, and a process waits for cells that others have locked.

    Args:
        base: recipe of the comparison.
        folder: folder of the comparison.
        jobs: number of runs at a time.
        sets: digest of the rows of each test set (`EvaluationSet.digest`), by the name of the set.
    """

    def __init__(self, base: Recipe, folder: Path, jobs: int, sets: Mapping[str, str]) -> None:
        self.base, self.folder, self.jobs, self.sets = _with_shared_caches(base, folder), folder, jobs, sets
        self._stopped = False
        self._started = time.time()
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
        return (folder / RUN_FILE).is_file() and (cell.search or is_evaluated(folder, self.sets))

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Run the cells that are not finished and return the reason of each failure, by the name of the cell.

        A cell that another process runs is waited for. It is run again here if that process dies, but not if it fails.

        Raises:
            UserError: a finished run was made with another recipe, or evaluated on other rows.
        """
        waiting = [cell for cell in cells if not self.finished(cell)]
        for cell in cells:
            if cell not in waiting:
                self._check_finished(cell)
        with progress_bar(disable=False) as bar, ThreadPoolExecutor(self.jobs) as pool:
            try:
                task, reasons = bar.add_task("runs", total=len(waiting)), dict[str, str | None]()
                while waiting:
                    elsewhere, runs = [], [pool.submit(self._run_cell, cell) for cell in waiting]
                    for cell, run in zip(waiting, runs, strict=True):
                        try:
                            reasons[cell.name] = run.result()
                            bar.advance(task)
                        except Timeout:
                            elsewhere.append(cell)
                    if elsewhere and len(elsewhere) == len(waiting):
                        time.sleep(POLL_SECONDS)
                    waiting = elsewhere
            except BaseException:  # Ctrl-C: stop the running cells and keep the finished ones
                self._stopped = True
                if any(process.poll() is None for process in self._processes):
                    logger.warning(
                        "stopping the running trainings, which first save a checkpoint after their current step"
                    )
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._processes:
                    process.terminate()
                raise
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _check_finished(self, cell: Cell) -> None:
        """Raise UserError if the results of a finished cell were made with another recipe or other rows, or are damaged."""
        folder = self.cell_folder(cell)
        if (folder / RECIPE_FILE).is_file():
            check_same_recipe(folder / RECIPE_FILE, self.recipe(cell), changeable=MOVABLE)
        check_results(folder)
        if not cell.search:
            check_rows(folder, self.sets)

    def _environment(self) -> dict[str, str]:
        """Divide the cores among the runs; processes that share cores through more threads slow each other down."""
        if self.jobs == 1:
            return dict(os.environ)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, **os.environ}

    def _run_cell(self, cell: Cell) -> str | None:
        """Run one cell and return the reason if it failed; raise Timeout if another process runs it."""
        failure = self.folder / "logs" / f"{cell.name}.failed"
        with lock_of(self.folder, cell.name).acquire(timeout=0):
            if self.finished(cell):
                self._check_finished(cell)
                return None
            if failure.is_file() and failure.stat().st_mtime >= self._started:
                return failure.read_text(encoding="utf-8")
            if self.cell_folder(cell).is_dir():  # the training goes on if its comparison was killed
                FileLock(self.cell_folder(cell) / LOCK_FILE).acquire(timeout=0).lock.release()
            reason, stopped = self._train(cell)
            failure.unlink(missing_ok=True)
            if reason is not None and not stopped:  # another process continues a run that was stopped
                write_file(failure, reason.encode())
            return reason

    def _train(self, cell: Cell) -> tuple[str | None, bool]:
        """Train a cell; return why it failed, if it did, and whether it was stopped from outside."""
        path = self.folder / "recipes" / f"{cell.name}.yaml"
        write_file(path, self.recipe(cell).dump().encode())
        log = self.folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        (self.cell_folder(cell) / CHECKSUMS).unlink(missing_ok=True)
        with log.open("wb") as stream:
            command = train_command(path, self.cell_folder(cell))
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=self._environment())
            self._processes.append(process)
            process.wait()
        if process.returncode != 0:
            stopped = self._stopped or process.returncode in _STOPPED
            return failure_reason(log, process.returncode), stopped
        check_results(self.cell_folder(cell))
        return None, False


def is_evaluated(folder: Path, sets: Iterable[str]) -> bool:
    """Return whether the folder of a run has the scores of all these test sets."""
    return all((folder / "eval" / f"{name}.json").is_file() for name in sets)


def check_rows(folder: Path, sets: Mapping[str, str]) -> None:
    """Raise UserError if the scores of a finished cell are those of other rows, because a test set was changed since then."""
    for name, digest in sets.items():
        path = folder / "eval" / f"{name}.json"
        if json.loads(path.read_text(encoding="utf-8"))["signature"]["data"]["sha256"] != digest:
            raise UserError(
                f"{path} has the scores of other rows than the test set has now: restore the test set, choose another "
                f"--output, or delete {folder} to run this row again"
            )


def check_results(folder: Path) -> None:
    """Verify the files of a finished cell that the tables read, or write their checksums if there are none yet.

    Raises:
        UserError: a file is missing or damaged, or was changed after the cell was finished.
    """
    if not (folder / CHECKSUMS).is_file():
        names = (RUN_FILE, RECIPE_FILE, TRAINER_STATE_NAME)
        write_checksums(folder, [*(folder / name for name in names), *(folder / "eval").glob("*.json*")])
    elif fault := checksum_fault(folder):
        raise UserError(
            f"the results in {folder} cannot be used: {fault}; restore the file, delete the folder to run this row again, or "
            f"delete {CHECKSUMS} there to accept the files as they are"
        )


def train_command(recipe: Path, folder: Path) -> list[str]:
    """Return the command that trains and evaluates a cell, or continues it if its folder exists."""
    resume = ["--resume"] if folder.exists() else []
    return [sys.executable, "-m", "dwakd", "train", str(recipe), "--output", str(folder), *resume]


def failure_reason(log: Path, code: int) -> str:
    """Return the last error in the log of a run, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = ([line for line in lines if line.startswith("error:")] or lines or [f"exit code {code}"])[-1]
    return f"{last.removeprefix('error: ')} ({log})"


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
    reading |= {"template_date", "special_tokens_in_prompts", "invalid_rows", "limit"}
    data = recipe.data.model_dump(include=reading)
    if data["template_date"] is None:
        del data["template_date"]  # which older comparisons did not have
    teachers = [one.model_dump(exclude={"cache", "cache_dtype", "weight"}) for one in recipe.teachers[:1]]
    return {
        "data": data,
        "teachers": teachers,
        "generate": recipe.generate.model_dump(exclude={"output", "batch_size"}),
    }


def _with_shared_caches(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with a cache for each teacher, which the rows that change neither data nor models share."""
    teachers = _cached(recipe.teachers, folder / "teacher-cache", {None})
    given = teachers if isinstance(recipe.teacher, list) else next(iter(teachers), None)
    return recipe.model_copy(update={"teacher": given})


def _with_caches(row: Recipe, recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a row with a cache for each teacher, which all rows with the same data and models share."""
    if not row.loss.needs_teacher or not cacheable(row):
        return row
    content = _cached_content(row)
    if content == _cached_content(recipe):
        return row.replace(teacher=_cached(row.teachers, folder / "teacher-cache", {None}))
    path = folder / f"teacher-cache-{json_digest(content)[:8]}"
    return row.replace(teacher=_cached(row.teachers, path, {None, *(one.cache for one in recipe.teachers)}))


def _cached(teachers: list[TeacherSection], path: Path, replaced: set[str | None]) -> list[TeacherSection]:
    """Return teachers whose caches are `path`, `path`-2 and so on, where their own cache is among those to replace."""
    paths = [str(path), *(f"{path}-{number}" for number in range(2, len(teachers) + 1))]
    pairs = zip(teachers, paths, strict=False)
    return [one.model_copy(update={"cache": new}) if one.cache in replaced else one for one, new in pairs]


def _cached_content(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a recipe that determine what a teacher's cache contains."""
    content = recipe.model_dump(exclude={"generate": {"output", "batch_size"}})
    teachers = [one.model_dump(exclude={"cache", "weight"}) for one in recipe.teachers]
    return {name: content[name] for name in ("student", "data", "generate")} | {"teachers": teachers}
