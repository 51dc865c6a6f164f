"""Student and loss in one module, so that wrappers reduce the gradients of both and checkpoints hold both."""

from typing import Any

import torch
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss
from dwakd.losses.several_teachers import SeveralTeachers
from dwakd.training.teacher import side_rows


class Distiller(nn.Module):
    """Runs the student on a batch and the loss on its response rows.

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        loss: the method, or several; its parameters (projectors) train with the student.
    """

    accepts_loss_kwargs = True
    """For transformers.Trainer: the loss is already divided by the tokens of the whole optimiser batch."""
    _keys_to_ignore_on_save = None

    def __init__(self, student: nn.Module, loss: DistillationLoss[Any] | SeveralTeachers) -> None:
        super().__init__()
        self.student = student
        self.loss = loss

    @property
    def config(self) -> Any:
        return self.student.config

    def get_input_embeddings(self) -> nn.Module:
        """The student's, for `TrainingArguments.neftune_noise_alpha`."""
        return self.student.get_input_embeddings()  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Delegated to the student, for `TrainingArguments.gradient_checkpointing`."""
        self.student.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def forward(
        self,
        batch: dict[str, Any],
        teacher: ModelSide | list[ModelSide] | None = None,
        num_tokens: Tensor | float | None = None,
        teacher_scale: TeacherScale | list[TeacherScale] | None = None,
    ) -> dict[str, Any]:
        """The loss of a collated batch as {"loss": scalar with gradient, "terms": {name: detached scalar}}.

        Args:
            batch: what `PairedCollator` returns.
            teacher: the teacher's rows of the same batch; a list of several teachers'.
            num_tokens: see `DistillationLoss.forward`.
            teacher_scale: see `DistillationLoss.forward`.
        """
        student = side_rows(self.student, batch, "student", attention=self.loss.needs_attention)
        output = self._loss(student, teacher, num_tokens, teacher_scale)
        return {"loss": output.loss, "terms": output.terms}

    # The kernels bring their own compiled code; `torch_compile` is for the student.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _loss(self, student: ModelSide, *arguments: Any) -> LossOutput:
        teacher, num_tokens, teacher_scale = arguments
        with torch.autocast(student.hidden.device.type, enabled=False):
            output: LossOutput = self.loss(student, teacher, num_tokens=num_tokens, teacher_scale=teacher_scale)
        return output
