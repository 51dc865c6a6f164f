"""Save checkpoints that are complete or recognised as incomplete, and delete old ones only when a newer one is complete."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.filesize import decimal
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dwakd.checksums import CHECKSUMS, begin_checksums, checksum_fault, has_checksums, write_checksums
from dwakd.errors import UserError, reason_of
from dwakd.folders import UNFINISHED
from dwakd.training.run_folder import checkpoints_in, last_checkpoint

logger = logging.getLogger(__name__)


class CheckpointTrainer(Trainer):
    """A Trainer whose checkpoints have checksums, which are written last and verified when training is resumed."""

    verified_checkpoint: str | None = None
    """A checkpoint whose checksums have been verified already."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as in transformers; `resume_from_checkpoint=True` continues from the newest complete checkpoint.

        Raises:
            UserError: a file of the checkpoint is missing or damaged.
        """
        if resume_from_checkpoint is True:
            self.verified_checkpoint = resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint and str(resume_from_checkpoint) != self.verified_checkpoint:
            self.check_checkpoint(str(resume_from_checkpoint))
        folder = Path(str(self.args.output_dir))
        if not resume_from_checkpoint and folder.is_dir() and (found := checkpoints_in(folder)):
            logger.warning(
                "%s has checkpoints of an earlier run, such as %s: delete them, or choose another output_dir, because "
                "resume_from_checkpoint=True continues from the one with the largest step",
                *(folder, found[-1].name),
            )
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _last_checkpoint(self) -> str:
        folder = Path(str(self.args.output_dir))
        found = from_first_rank(last_checkpoint(folder) if self.is_world_process_zero() and folder.is_dir() else None)
        if found is None:
            raise UserError(f"{folder} has no complete checkpoint; train without resume_from_checkpoint")
        return str(found)

    def check_checkpoint(self, folder: str) -> None:
        """Raise a UserError if a file of a checkpoint is missing or damaged; the first rank checks for all."""
        fault = checksum_fault(Path(folder)) if self.is_world_process_zero() else None
        if fault is not None:
            raise UserError(f"the checkpoint {folder} cannot be used: {fault}; restore it, or use another checkpoint")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self._get_output_dir(trial=trial))
        folder = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # transformers would delete others before all ranks have saved
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with disk_errors_explained(folder, remove=self.args.should_save):
                if self.args.should_save:
                    begin_checksums(folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_checksums(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            best = Path(self.state.best_model_checkpoint or folder)
            delete_checkpoints(output, limit, {folder.name, best.name})


def delete_checkpoints(output: Path, limit: int, kept: set[str]) -> None:
    """Delete checkpoints until at most `limit` are left: incomplete ones first, then the oldest, and none of `kept`."""
    for path in output.glob(f".{PREFIX_CHECKPOINT_DIR}-*{UNFINISHED}deleted"):  # left by a killed process
        shutil.rmtree(path, ignore_errors=True)
    found = checkpoints_in(output)
    found.sort(key=lambda path: (path / CHECKSUMS).stat().st_mtime if has_checksums(path) else 0)
    others = [path for path in found if path.name not in kept]
    for path in others[: max(len(found) - limit, 0)]:
        gone = path.with_name(f".{path.name}{UNFINISHED}deleted")
        path.rename(gone)  # what is left of it if the process is killed does not look like a checkpoint
        shutil.rmtree(gone, ignore_errors=True)


def from_first_rank(value: Any) -> Any:
    """Return the value of the first rank on every rank."""
    return broadcast_object_list([value])[0]


@contextmanager
def disk_errors_explained(folder: Path, *, remove: bool = False) -> Iterator[None]:
    """Turn an error in writing a folder into a UserError; `remove` deletes the folder, which is incomplete."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save cannot write
            raise
        reason = getattr(error, "strerror", None) or reason_of(error)
        free = decimal(shutil.disk_usage(next(path for path in folder.parents if path.exists())).free)
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder} cannot be written ({reason:.200}; {free} free on the disk): free some space or correct the folder, "
            "and continue with --resume"
        ) from error
