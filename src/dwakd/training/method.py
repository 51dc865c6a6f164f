"""Build the loss of the configured method from the models and tokenizers."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.losses import DistillationLoss, ModelPair, SeveralTeachers, Widths, build_loss
from dwakd.models.head import embedding_table, output_head
from dwakd.recipe.training import DistillConfig
from dwakd.training.teacher import Teacher


def build_method(
    args: DistillConfig,
    student: PreTrainedModel | PeftModel,
    teachers: list[Teacher],
    encoders: tuple[TextEncoder, ...],
) -> DistillationLoss[Any] | SeveralTeachers:
    """Build the loss of the configured method for teachers that are prepared; `encoders` begins with the student's.

    Raises:
        UserError: the method refuses an option, or requires one tokenizer and there are two.
    """
    head = output_head(student).detached()
    embedding_size = embedding_table(student).shape[1]
    own = encoders[0]
    losses = []
    for teacher, encoder in zip(teachers, encoders[1:], strict=True):
        widths = Widths(head.hidden_size, teacher.head.hidden_size, embedding_size, teacher.embedding_size)
        pair = None
        if args.method_options.needs_models == "pair":
            ends = own.end_token_id, encoder.end_token_id
            pair = ModelPair(widths, own.token_bytes(), encoder.token_bytes(), head, teacher.head, ends)
        if args.method_options.needs_same_vocabulary and own.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            raise UserError(
                f"method {args.method} requires a teacher with the student's tokenizer, and their tokenizers differ: "
                "use dwa_kd, or dskd with attention, which work with any tokenizers"
            )
        losses.append(build_loss(args.method, args.loss_options, widths=widths, pair=pair))
    if not losses:
        return build_loss(args.method, args.loss_options)
    if len(losses) == 1:
        return losses[0]
    return SeveralTeachers(
        losses, args.teacher_weights, gate=args.teacher_gate, temperature=args.teacher_gate_temperature
    )
