"""From the models and tokenizers at hand to the method that a configuration names."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.losses import DistillationLoss, ModelPair, SeveralTeachers, Widths, build_loss, method_class
from dwakd.models.head import embedding_table, output_head
from dwakd.training.config import DistillConfig
from dwakd.training.teacher import Teacher


def build_method(
    args: DistillConfig,
    student: PreTrainedModel | PeftModel,
    teachers: list[Teacher],
    encoders: tuple[TextEncoder, ...],
) -> DistillationLoss[Any] | SeveralTeachers:
    """The configured method, given what it needs of the models; one for each teacher if there are several.

    Raises:
        UserError: an option that the method refuses, or two tokenizers where it needs one.
    """
    own, *theirs = encoders
    losses = [_build(args, student, teacher, (own, encoder)) for teacher, encoder in zip(teachers, theirs, strict=True)]
    if not losses:
        return build_loss(args.method, args.loss_options)
    if len(losses) == 1:
        return losses[0]
    return SeveralTeachers(
        losses, args.teacher_weights, gate=args.teacher_gate, temperature=args.teacher_gate_temperature
    )


def _build(
    args: DistillConfig,
    student: PreTrainedModel | PeftModel,
    teacher: Teacher,
    encoders: tuple[TextEncoder, TextEncoder],
) -> DistillationLoss[Any]:
    student_encoder, teacher_encoder = encoders
    head = output_head(student).detached()
    widths = Widths(
        head.hidden_size, teacher.head.hidden_size, embedding_table(student).shape[1], teacher.embedding_size
    )
    pair = None
    if method_class(args.method).options_type.needs_models == "pair":
        tokens = [encoder.token_bytes() for encoder in (student_encoder, teacher_encoder)]
        ends = student_encoder.end_token_id, teacher_encoder.end_token_id
        pair = ModelPair(widths, tokens[0], tokens[1], head, teacher.head, ends)
    loss = build_loss(args.method, args.loss_options, widths=widths, pair=pair)
    vocabularies = [encoder.tokenizer.get_vocab() for encoder in (student_encoder, teacher_encoder)]
    if loss.options.needs_same_vocabulary and vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"method {args.method} needs a teacher with the student's tokenizer, and theirs differ; "
            "dwa_kd and dskd with attention work across tokenizers"
        )
    return loss
