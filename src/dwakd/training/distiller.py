"""Student and loss in one module, so that wrappers reduce the gradients of both and checkpoints contain both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide, TokenBatch
from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.losses import DistillationLoss, ModelPair, SeveralTeachers, TeacherScale, Widths, build_loss
from dwakd.losses.accuracy import count_correct
from dwakd.models.head import embedding_table, output_head
from dwakd.models.rows import response_side
from dwakd.recipe.training import DistillConfig
from dwakd.training.student import widest_dtype
from dwakd.training.teacher import Teacher

LOSS_STATE = "distillation.safetensors"
Loss = DistillationLoss[Any] | SeveralTeachers


class Distiller(nn.Module):
    """Run the student on a batch, and the loss on its response positions.

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        loss: the method, or several. Its parameters (projectors) are trained with the student.
    """

    accepts_loss_kwargs = True
    """For transformers.Trainer: the loss is already divided by the tokens of the whole optimiser batch."""
    _keys_to_ignore_on_save = None

    def __init__(self, student: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.config = student.config
        self.get_input_embeddings = student.get_input_embeddings  # for neftune_noise_alpha
        self.gradient_checkpointing_enable = student.gradient_checkpointing_enable

    def forward(
        self,
        student: TokenBatch,
        teachers: Sequence[ModelSide] = (),
        teacher_scales: Sequence[TeacherScale] = (),
        num_tokens: Tensor | float | None = None,
    ) -> dict[str, Any]:
        """Compute the loss of a batch as {"loss": scalar with gradient, "terms": {name: detached scalar}}.

        In eval mode with one teacher, the entry "counts" contains the result of `count_correct`.

        Args:
            student: the student's tokens.
            teachers: the side of each teacher.
            teacher_scales: statistics of each teacher over the whole optimiser batch. Default: those of this batch.
            num_tokens: see `DistillationLoss.forward`.
        """
        side = response_side(self.student, student, attention=self.loss.needs_attention)
        output = self._loss(side, teachers, teacher_scales, num_tokens)
        result = {"loss": output.loss, "terms": output.terms}
        if not self.training and teachers and not isinstance(self.loss, SeveralTeachers):
            scale = next(iter(teacher_scales), None) or TeacherScale.of(teachers[0])
            result["counts"] = count_correct(self.loss, side, teachers[0], scale)
        return result

    # The kernels bring their own compiled code; `torch_compile` is for the student.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _loss(self, student: ModelSide, teachers: Any, scales: Any, num_tokens: Any) -> LossOutput:
        if not isinstance(self.loss, SeveralTeachers):
            teachers, scales = (next(iter(values), None) for values in (teachers, scales))
        with torch.autocast(student.hidden.device.type, enabled=False):
            output: LossOutput = self.loss(student, teachers, num_tokens=num_tokens, teacher_scale=scales or None)
        return output

    def load_checkpoint(self, folder: str | Path) -> None:
        """Load the weights of student and loss from a checkpoint in place."""
        load_student(self.student, folder)
        self.loss.load_state_dict(load_file(Path(folder) / LOSS_STATE))


def load_student(student: Any, folder: str | Path) -> None:
    """Load the weights (or the adapter) of a saved student in place. Each parameter keeps its own dtype."""
    if isinstance(student, PeftModel):
        (adapter,) = student.peft_config
        set_peft_model_state_dict(student, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter)
        return
    saved = type(student).from_pretrained(folder, dtype=widest_dtype(student))
    student.load_state_dict(saved.state_dict())


def build_method(
    args: DistillConfig, student: nn.Module, teachers: Sequence[Teacher], encoders: Sequence[TextEncoder]
) -> Loss:
    """Build the loss of the configured method for teachers that are prepared; `encoders` begins with the student's.

    Raises:
        UserError: the method refuses an option, or requires one tokenizer and there are two.
    """
    head, needs, own = output_head(student).detached(), args.method_options, encoders[0]
    embedding_size = embedding_table(student).shape[1]
    losses = []
    for teacher, encoder in zip(teachers, encoders[1:], strict=True):
        widths = Widths(head.hidden_size, teacher.head.hidden_size, embedding_size, teacher.table.shape[1])
        pair = None
        if needs.needs_models == "pair":
            ends = own.end_token_id, encoder.end_token_id
            pair = ModelPair(widths, own.token_bytes(), encoder.token_bytes(), head, teacher.head, ends)
        one_tokenizer = [part.method_name() for part in needs.parts if part.needs_same_vocabulary]
        if one_tokenizer and own.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            raise UserError(
                f"method {one_tokenizer[0]} requires a teacher with the student's tokenizer, and their tokenizers differ: "
                "use dwa_kd, or dskd with attention, which work with any tokenizers"
            )
        losses.append(build_loss(args.method, args.loss_options, widths=widths, pair=pair))
    if len(losses) > 1:
        gate, temperature = args.teacher_gate, args.teacher_gate_temperature
        return SeveralTeachers(losses, args.teacher_weights, gate=gate, temperature=temperature)
    return losses[0] if losses else build_loss(args.method, args.loss_options)
