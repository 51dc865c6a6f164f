"""Send pictures of the alignment to the trackers of a run."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_callback import TrainerCallback

from dwakd.inspection.charts import heat_map
from dwakd.inspection.computed import by_method
from dwakd.inspection.tokens import align_rows
from dwakd.losses import SeveralTeachers
from dwakd.models.rows import evaluating, response_side
from dwakd.training.teacher import OnlineTeacher
from dwakd.training.teachers import run_teachers
from dwakd.training.trainer import DistillTrainer

if TYPE_CHECKING:
    from PIL import Image  # extra dwakd[report]

logger = logging.getLogger(__name__)

_TRACKERS = ("TensorBoardCallback", "MLflowCallback", "WandbCallback", "TrackioCallback")


class AlignmentCallback(TrainerCallback):
    """Send heat maps of the first evaluation row to the trackers in `report_to`, at each evaluation and at the last step.

    The maps are those of `dwakd inspect`: cross-model attention, and expected paths of Soft-DTW with the band. Nothing is sent
    if the method computes no such map, if the evaluation set is already encoded, or if a model is sharded over processes.

    Examples:
        >>> trainer.add_callback(AlignmentCallback(trainer))  # doctest: +SKIP
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer, self._step = trainer, -1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trackers = [one for one in self.trainer.callback_handler.callbacks if type(one).__name__ in _TRACKERS]
        if trackers and state.is_world_process_zero and state.global_step != self._step:
            self._step = state.global_step  # of several evaluation sets, the first one is sent
            for name, image in self.images().items():
                for tracker in trackers:
                    _send(tracker, name, image, self._step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch" and not control.should_evaluate:
            self.on_evaluate(args, state, control)  # otherwise an evaluation follows

    def images(self) -> dict[str, Image.Image]:
        """Return the heat maps for the first evaluation row, by name."""
        trainer = self.trainer
        examples, pairs = next(iter(trainer.eval_sets.values()), ([], None))
        divided = any(isinstance(teacher, OnlineTeacher) and teacher.divided for teacher in trainer.teachers)
        if not (examples and pairs and trainer.teachers) or trainer.is_sharded or divided:
            return {}
        index = pairs.rows[0].chosen or 0
        sides = trainer.encoders[0], trainer.encoders[index + 1]
        (row,) = align_rows(replace(pairs, rows=pairs.rows[:1]).of_teacher(index), examples, sides)
        distiller: Any = trainer.accelerator.unwrap_model(trainer.model)
        loss: Any = distiller.loss.losses[index] if isinstance(distiller.loss, SeveralTeachers) else distiller.loss
        with evaluating(distiller), torch.no_grad():
            batch = trainer.data_collator([pairs[0]]).to(trainer.args.device)
            _, teachers, scales = run_teachers([batch], trainer.teachers, None)[0]
            student, teacher = (
                response_side(distiller.student, batch.student, attention=loss.needs_attention),
                teachers[index],
            )
            computed = by_method(loss, student, teacher, scales[index])[0]  # type: ignore[arg-type]  # the row's own teacher
        if any(one.maps for one in computed) and not (find_spec("altair") and find_spec("vl_convert")):
            logger.warning('the alignment is not sent to trackers; install its charts with pip install "dwakd[report]"')
            return {}
        from PIL import Image

        found = {}
        for one in computed:
            for title, table in one.maps.items():
                file = io.BytesIO()
                heat_map(row, table, title, one.outside_band).save(file, format="png")
                found[f"alignment/{one.method}_{title.replace(' ', '_')}"] = Image.open(file).convert("RGB")
        return found


def _send(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    """Send an image to a tracker of transformers."""
    if package := getattr(tracker, "_wandb", None) or getattr(tracker, "_trackio", None):
        package.log({name: package.Image(image), "train/global_step": step})
    elif package := getattr(tracker, "_ml_flow", None):
        package.log_image(image, artifact_file=f"{name}_{step}.png")
    elif tracker.tb_writer is not None:  # it is opened when training begins
        tracker.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
