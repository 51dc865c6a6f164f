"""Student and loss in one module, so that wrappers reduce the gradients of both and checkpoints contain both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide, TokenBatch
from dwakd.losses import DistillationLoss, SeveralTeachers, TeacherScale
from dwakd.models.rows import response_side


class Distiller(nn.Module):
    """Run the student on a batch, and the loss on its response positions.

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        loss: the method, or several. Its parameters (projectors) are trained with the student.
    """

    accepts_loss_kwargs = True
    """For transformers.Trainer: the loss is already divided by the tokens of the whole optimiser batch."""
    _keys_to_ignore_on_save = None

    def __init__(self, student: nn.Module, loss: DistillationLoss[Any] | SeveralTeachers) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.get_input_embeddings = student.get_input_embeddings  # for neftune_noise_alpha
        self.gradient_checkpointing_enable = student.gradient_checkpointing_enable

    @property
    def config(self) -> Any:
        """The student's config."""
        return self.student.config

    def forward(
        self,
        student: TokenBatch,
        teachers: Sequence[ModelSide] = (),
        teacher_scales: Sequence[TeacherScale] = (),
        num_tokens: Tensor | float | None = None,
    ) -> dict[str, Any]:
        """Compute the loss of a batch as {"loss": scalar with gradient, "terms": {name: detached scalar}}.

        Args:
            student: the student's tokens.
            teachers: the side of each teacher.
            teacher_scales: statistics of each teacher over the whole optimiser batch. Default: those of this batch.
            num_tokens: see `DistillationLoss.forward`.
        """
        side = response_side(self.student, student, attention=self.loss.needs_attention)
        output = self._loss(side, teachers, teacher_scales, num_tokens)
        return {"loss": output.loss, "terms": output.terms}

    # The kernels bring their own compiled code; `torch_compile` is for the student.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _loss(self, student: ModelSide, teachers: Any, scales: Any, num_tokens: Any) -> LossOutput:
        if not isinstance(self.loss, SeveralTeachers):
            teachers, scales = (next(iter(values), None) for values in (teachers, scales))
        with torch.autocast(student.hidden.device.type, enabled=False):
            output: LossOutput = self.loss(student, teachers, num_tokens=num_tokens, teacher_scale=scales or None)
        return output
