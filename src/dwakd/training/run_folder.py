"""The folder of a run: whose it is, how far the run came, and that one process alone trains into it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from dwakd.config import RECIPE_FILE, Recipe, parse_yaml, read_saved_recipe
from dwakd.errors import UserError
from dwakd.folders import check_output_folder
from dwakd.training.checkpoint import LOSS_STATE, checkpoint_fault, ends_well

logger = logging.getLogger(__name__)

RUN_FILE = "dwakd-run.json"
LOCK_FILE = ".lock"
LENGTH = re.compile(r"training\.(max_steps|num_train_epochs)$")
CHANGEABLE = re.compile(rf"evaluation\.|training\.disable_tqdm$|{LENGTH.pattern}")
"""Options that may differ when a run is resumed."""
CHECKPOINT = re.compile(r"checkpoint-\d+")


def check_output(folder: Path, *, resume: bool, recipe: Recipe) -> str | None:
    """The checkpoint to resume from, or None for a fresh folder.

    Raises:
        UserError: the folder already holds a run and `resume` is off, or holds another recipe's run.
    """
    if os.environ.get("RANK", "0") != "0":  # the first rank speaks for all, before it writes anything
        return last_checkpoint(folder) if resume and folder.exists() else None
    check_output_folder(folder)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    started = any(RECIPE_FILE not in name for name in names - {LOCK_FILE})
    if not started:  # a run that broke before its first checkpoint leaves its recipe at the most
        return None
    saved = folder / RECIPE_FILE
    if not saved.is_file():
        raise UserError(f"output folder {folder} is not empty and holds no run of dwakd; choose another with --output")
    if not resume:
        raise UserError(
            f"output folder {folder} already holds a run; choose another with --output, or --resume to go on with it"
        )
    check_same_recipe(saved, recipe, changeable=CHANGEABLE)
    return last_checkpoint(folder)


def check_same_recipe(saved: Path, recipe: Recipe, *, changeable: re.Pattern[str]) -> None:
    """Refuse a run's folder whose saved recipe differs in more than options that match `changeable`.

    Raises:
        UserError: it holds another run, of which it says which option differs; or the saved recipe is damaged.
    """
    for name, (was, is_now) in changed_options(saved, recipe).items():
        if not changeable.match(name):
            raise UserError(
                f"output folder {saved.parent} holds another run: {name} is {was} there and {is_now} here; choose "
                "another with --output"
            )


def changed_options(saved: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The options in which a saved recipe differs, by dotted name, with their values there and here.

    Raises:
        UserError: the saved recipe is damaged.
    """
    before = _flat(read_saved_recipe(saved, mend="restore it, or choose another folder with --output"))
    now = _flat(parse_yaml(recipe.dump()))
    both = {name: (before.get(name, "unset"), now.get(name, "unset")) for name in sorted(before.keys() | now.keys())}
    return {name: (was, is_now) for name, (was, is_now) in both.items() if was != is_now}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted name; of several teachers, those of the second begin with teacher.2."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0] if len(value) == 1 else {str(k): item for k, item in enumerate(value, start=1)}
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; one cut off in the writing is passed over with a warning."""
    needed = (TRAINER_STATE_NAME, "optimizer.pt", "scheduler.pt", LOSS_STATE)
    steps = {int(path.name.split("-")[1]): path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)}
    for step in sorted(steps, reverse=True):
        fault = checkpoint_fault(steps[step], needed)
        if fault is None:
            return str(steps[step])
        logger.warning("%s is not whole and is passed over: its %s", steps[step], fault)
    if steps:
        logger.warning("no checkpoint in %s is whole: training starts from the beginning", folder)
    return None


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder came to its end, and is to be no longer now."""
    if not (folder / RUN_FILE).is_file():
        return False
    if not ends_well(folder / TRAINER_STATE_NAME):
        logger.warning("%s is damaged, and the run counts as unfinished", folder / TRAINER_STATE_NAME)
        return False
    return not any(LENGTH.match(name) for name in changed_options(folder / RECIPE_FILE, recipe))


def has_steps_left(checkpoint: str | None, recipe: Recipe) -> bool:
    """Whether a run goes on beyond a checkpoint, where `max_steps` says so.

    Raises:
        UserError: the checkpoint is beyond `max_steps`.
    """
    limit = recipe.training.get("max_steps", -1)
    if checkpoint is None or limit <= 0:
        return True
    done = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if done > limit:
        raise UserError(
            f"{checkpoint} is of step {done}, beyond training.max_steps {limit}: raise it, or choose another folder with "
            "--output"
        )
    return bool(done < limit)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, made if it isn't there.

    Raises:
        UserError: another process trains into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is training into {folder}: wait for it, or choose another with --output"
        ) from None
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(
            missing_ok=True
        )  # while it is held: who opened it meanwhile sees that it has no name
        lock.release()
