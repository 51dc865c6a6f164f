"""Student and loss in one module, so that wrappers reduce the gradients of both and checkpoints contain both."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dwakd.batch import LossOutput, ModelSide, TokenBatch
from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError, explained
from dwakd.kernels.head_loss import only_term, scaled_terms
from dwakd.losses import DistillationLoss, SeveralTeachers, TeacherScale, Widths, build_loss
from dwakd.losses.accuracy import count_correct
from dwakd.losses.alignment import UNWEIGHTED
from dwakd.models.head import causal_lm, embedding_table, output_head
from dwakd.models.rows import response_side
from dwakd.models.sides import pair_of
from dwakd.recipe.training import DistillConfig
from dwakd.training.student import widest_dtype
from dwakd.training.teacher import Teacher

LOSS_STATE = "distillation/maps.safetensors"
"""State of the loss. Servers such as vLLM read every safetensors file that lies directly in a model's folder."""
_OF_STUDENT = {
    "save_pretrained",
    "push_to_hub",
    "generate",
    "generation_config",
    "print_trainable_parameters",
    "device",
}
"""Attributes of a student that users look for in `trainer.model`."""
Loss = DistillationLoss[Any] | SeveralTeachers


class Distiller(nn.Module):
    """Run the student on a batch, and the loss on its response positions.

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        loss: the method, or several. Its parameters (projectors) are trained with the student.
        packed: whether the student runs on the rows of a batch as one sequence, without padding.
        neftune: whether transformers adds noise to the embeddings.
    """

    accepts_loss_kwargs = True
    """For transformers.Trainer: the loss is already divided by the tokens of the whole optimiser batch."""
    _keys_to_ignore_on_save = None

    def __init__(self, student: nn.Module, loss: Loss, *, packed: bool = False, neftune: bool = False) -> None:
        super().__init__()
        self.student, self.packed = student, packed
        self.loss = loss
        self.term_scales: dict[str, float] = {}  # factors of terms during training; see `balance.py`
        self.config = student.config
        self._no_split_modules = getattr(causal_lm(student), "_no_split_modules", None)  # units of FSDP
        self.tie_weights = student.tie_weights
        if neftune:  # otherwise accelerate's FSDP would gather both matrices separately
            self.get_input_embeddings = student.get_input_embeddings
            self.get_output_embeddings = student.get_output_embeddings
        for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):  # of transformers 5 and 6
            if hasattr(student, name):
                setattr(self, name, getattr(student, name))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in _OF_STUDENT:
                raise
            raise AttributeError(
                f"trainer.model contains the student and the maps of the method, and has no {name}: use "
                f"trainer.student.{name}, or trainer.save_model() to save the student"
            ) from error

    def forward(
        self,
        student: TokenBatch,
        teachers: Sequence[ModelSide | None] = (),
        teacher_scales: Sequence[TeacherScale] = (),
        num_tokens: Tensor | float | None = None,
        *,
        num_sampled: int = 0,
        term_gradients: bool = False,
    ) -> dict[str, Any]:
        """Compute the loss of a batch as {"loss": scalar with gradient, "terms": {name: detached scalar}}.

        In eval mode with one teacher, the entry "counts" contains the result of `count_correct`.

        Args:
            student: the student's tokens.
            teachers: the side of each teacher; None if it teaches none of the examples.
            teacher_scales: statistics of each teacher over the whole optimiser batch. Default: those of this batch.
            num_tokens: see `DistillationLoss.forward`.
            num_sampled: number of examples at the end of the batch whose responses the student sampled. They do not
                count in the terms that need given responses (`DistillationLoss.given_terms`).
            term_gradients: whether to return `gradient_squares` as "gradient_squares".
        """
        side = response_side(self.student, student, attention=self.loss.needs_attention, packed=self.packed)
        output = self._loss(side, teachers, teacher_scales, num_tokens, num_sampled)
        result: dict[str, Any] = {"loss": output.loss, "terms": output.terms}
        if term_gradients:
            names = [name for name in self.loss.terms if name in output.terms and not name.endswith(UNWEIGHTED)]
            arguments = teachers, teacher_scales, num_tokens, num_sampled
            result["gradient_squares"] = self.gradient_squares(names, side, *arguments)
        if not self.training and teachers and teachers[0] and not isinstance(self.loss, SeveralTeachers):
            scale = next(iter(teacher_scales), None) or TeacherScale.of(teachers[0])
            with torch.autocast(side.hidden.device.type, enabled=False):
                result["counts"] = count_correct(self.loss, side, teachers[0], scale)
        return result

    def gradient_squares(self, names: Sequence[str], student: ModelSide, *arguments: Any) -> dict[str, Tensor]:
        """Compute, for each term, the squared norm of its gradient at the student's hidden states.

        The gradient is that of the term times its weight in the loss. The loss is computed once more for each term, on
        detached hidden states, so that no gradient reaches a parameter.
        """
        hidden = student.hidden.detach().requires_grad_()
        embeddings, head = student.target_embeddings.detach(), student.head.detached()
        side = replace(student, hidden=hidden, target_embeddings=embeddings, head=head)
        squares = {}
        for name in names:
            with torch.enable_grad(), only_term(name):
                loss = self._loss(side, *arguments).loss
            (gradient,) = torch.autograd.grad(loss, hidden, allow_unused=True, materialize_grads=True)
            squares[name] = gradient.float().square().sum()
        return squares

    # The kernels bring their own compiled code; `torch_compile` is for the student.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _loss(self, student: ModelSide, teachers: Any, scales: Any, num_tokens: Any, num_sampled: int) -> LossOutput:
        num_given, count = len(student.counts) - num_sampled, len(student.counts)
        if num_given and num_sampled:
            num_tokens = len(student.target_ids) if num_tokens is None else num_tokens
            parts = [(0, num_given, 0), (num_given, count, num_sampled)]
            given, sampled = (
                self._loss(
                    student.select(range(start, stop)),
                    [teacher and teacher.examples(start, stop) for teacher in teachers],
                    scales,
                    num_tokens,
                    part_sampled,
                )
                for start, stop, part_sampled in parts
            )
            terms = {name: value + sampled.terms[name] for name, value in given.terms.items()}
            return LossOutput(given.loss + sampled.loss, terms)
        if num_sampled:
            student = replace(student, sampled=True)
        if not isinstance(self.loss, SeveralTeachers):
            teachers, scales = (next(iter(values), None) for values in (teachers, scales))
        scales_of_terms = self.term_scales if self.training else {}
        with torch.autocast(student.hidden.device.type, enabled=False), scaled_terms(scales_of_terms):
            output: LossOutput = self.loss(student, teachers, num_tokens=num_tokens, teacher_scale=scales or None)
        return output

    def load_checkpoint(self, folder: str | Path) -> None:
        """Load the weights of student and loss from a checkpoint in place.

        Raises:
            UserError: the checkpoint is that of another student or method.
        """
        with explained(f"{folder} is the checkpoint of another student or method, or damaged"):
            load_student(self.student, folder)
            self.loss.load_state_dict(load_file(Path(folder) / LOSS_STATE))


def load_student(student: Any, folder: str | Path) -> None:
    """Load the weights (or the adapter) of a saved student in place. Each parameter keeps its own dtype."""
    if isinstance(student, PeftModel):
        (adapter,) = student.peft_config
        set_peft_model_state_dict(student, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter)
        return
    saved, about = type(student).from_pretrained(folder, dtype=widest_dtype(student), output_loading_info=True)
    if missing := sorted(about["missing_keys"]):
        raise UserError(f"the weights in {folder} are not those of the student: {missing[0]} is missing")
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
        theirs = teacher.head.to(head.weight.device)  # a quantised model is on its GPU already
        widths = Widths(head.hidden_size, theirs.hidden_size, embedding_size, teacher.table.shape[1])
        pair = pair_of(widths, (head, theirs), (own, encoder)) if needs.needs_models == "pair" else None
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
