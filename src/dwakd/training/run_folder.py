"""The folder of a run: which run it contains, and how far the run got."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from dwakd.checksums import CHECKSUMS, checksum_fault
from dwakd.environment import global_rank
from dwakd.errors import UserError
from dwakd.folders import LOCK_FILE, check_output_folder
from dwakd.recipe.files import RECIPE_FILE, parse_yaml, read_saved_recipe
from dwakd.recipe.recipe import Recipe, recipe_from_dict
from dwakd.recipe.training import DistillConfig
from dwakd.training.callbacks import check_rows_of_step

logger = logging.getLogger(__name__)

RUN_FILE = "dwakd-run.json"
_LENGTH = re.compile(r"training\.(max_steps|num_train_epochs)$")
_ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")
_CHANGEABLE = re.compile(
    rf"evaluation\.|generate\.(output|batch_size)$|training\.(disable_tqdm|{'|'.join(_ROWS)})$|{_LENGTH.pattern}"
)
"""Options that may differ when a run is resumed."""


def check_output(folder: Path, *, resume: bool, recipe: Recipe) -> str | None:
    """Return the checkpoint from which to resume, or None if the run starts from the beginning.

    Ranks other than the first return None and have to take over its result.

    Raises:
        UserError: the folder contains other files, the run of another recipe, or a run although `resume` is not set.
    """
    if global_rank() != 0:  # the first rank checks for all, before it writes anything
        return None
    check_output_folder(folder)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if all(RECIPE_FILE in name for name in names - {LOCK_FILE}):
        return None  # a run that failed before its first checkpoint leaves at most its recipe
    saved = folder / RECIPE_FILE
    if not saved.is_file():
        raise UserError(f"output folder {folder} is not empty and holds no run of dwakd; choose another with --output")
    if not resume:
        raise UserError(f"output folder {folder} already holds a run; choose another with --output, or set --resume")
    check_same_recipe(saved, recipe, changeable=_CHANGEABLE)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        _check_same_batch(recipe, checkpoint)
    return checkpoint


def _check_same_batch(recipe: Recipe, checkpoint: str) -> None:
    """Raise UserError if a step of this command has other rows than the steps of the run that saved the checkpoint."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    now = processes * math.prod(recipe.training.get(name, getattr(DistillConfig, name)) for name in _ROWS)
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    check_rows_of_step(state, now, processes, checkpoint)


def check_same_recipe(saved: Path, recipe: Recipe, *, changeable: re.Pattern[str]) -> None:
    """Raise UserError if the saved recipe of a run differs in an option whose dotted name does not match `changeable`.

    The section `generate` has no effect on a run that does not train on the teacher's answers.
    """
    for name, (before, now) in _changed_options(saved, recipe).items():
        unused = name.startswith("generate.") and recipe.data.responses != "teacher"
        dated = name == "data.template_date" and now is None  # the run keeps its date
        if not unused and not dated and not changeable.match(name):
            raise UserError(
                f"output folder {saved.parent} holds another run: {name} is {before} there and {now} here; choose "
                "another with --output"
            )


def _changed_options(saved: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the saved and the given value of each option that differs, by dotted name.

    An option that is newer than the saved recipe has its default there.
    """
    content = read_saved_recipe(saved, fix="restore it, or choose another folder with --output")
    with contextlib.suppress(UserError):  # of options that this version does not know
        content = parse_yaml(recipe_from_dict(copy.deepcopy(content), "compare").dump())
    before = flat_options(content)
    now = flat_options(parse_yaml(recipe.dump()))
    both = {name: (before.get(name, "unset"), now.get(name, "unset")) for name in sorted(before | now)}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def flat_options(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every option by its dotted name; those of the second of several teachers begin with teacher.2."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0] if len(value) == 1 else {str(k): item for k, item in enumerate(value, start=1)}
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def saved_date(folder: Path) -> str | None:
    """Return the date that the chat templates of the run in a folder print, if there is such a run."""
    path = folder / RECIPE_FILE
    saved = read_saved_recipe(path, fix="restore it")["data"] if path.is_file() else {}
    date: str | None = saved.get("template_date")
    return date


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders of checkpoints in the folder of a run, complete or not, in the order of their steps."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint whose checksums agree; a warning names each newer one and its fault.

    Raises:
        UserError: no checkpoint is complete, and some were saved by a version of dwakd that wrote no checksums.
    """
    found = checkpoints_in(folder)
    for path in reversed(found):
        fault = checksum_fault(path)
        if fault is None and not any(path.glob("rng_state*.pth")):
            fault = "it contains no optimiser"  # save_only_model; DeepSpeed stores optimiser and schedule under its own names
        if fault is None:
            return str(path)
        logger.warning("skipping checkpoint %s: %s", path, fault)
    if any((path / TRAINER_STATE_NAME).is_file() and not (path / CHECKSUMS).is_file() for path in found):
        raise UserError(
            f"the checkpoints in {folder} have no checksums, because an older version of dwakd saved them: finish the run with "
            "that version, or choose another folder with --output"
        )
    if found:
        logger.warning("%s has no complete checkpoint, so training starts from the beginning", folder)
    return None


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether the run in a folder is finished and the recipe does not change its length."""
    if not (folder / RUN_FILE).is_file():
        return False
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        logger.warning("%s is damaged, so the run is treated as unfinished", folder / TRAINER_STATE_NAME)
        return False
    return not any(map(_LENGTH.match, _changed_options(folder / RECIPE_FILE, recipe)))


def has_steps_left(checkpoint: str | None, recipe: Recipe) -> bool:
    """Return whether training continues after a checkpoint, as far as `max_steps` determines it.

    Raises:
        UserError: the checkpoint is beyond `max_steps`.
    """
    limit = recipe.training.get("max_steps", -1)
    if checkpoint is None or limit <= 0:
        return True
    done: int = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if done > limit:
        raise UserError(
            f"{checkpoint} is of step {done}, beyond training.max_steps {limit}: raise max_steps or choose another --output"
        )
    return done < limit
