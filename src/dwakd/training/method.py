"""From the models and tokenizers at hand to the method that a configuration names."""

from transformers import PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.losses import DistillationLoss, ModelPair, Widths, build_loss, method_class
from dwakd.models.rows import embedding_table, output_head
from dwakd.training.config import DistillConfig
from dwakd.training.teacher import Teacher


def build_method(
    args: DistillConfig,
    student: PreTrainedModel,
    teacher: Teacher | None,
    encoders: tuple[TextEncoder, TextEncoder | None],
) -> DistillationLoss:
    """The configured method, given what it needs of the two models.

    Raises:
        UserError: an option that the method refuses, or two tokenizers where it needs one.
    """
    method = method_class(args.method)
    student_encoder, teacher_encoder = encoders
    if teacher is None or teacher_encoder is None:
        return build_loss(args.method, args.loss_options)
    head = output_head(student).detached()
    widths = Widths(
        head.hidden_size, teacher.head.hidden_size, embedding_table(student).shape[1], teacher.embedding_size
    )
    pair = None
    if method.needs_pair:
        tokens = [encoder.token_bytes() for encoder in (student_encoder, teacher_encoder)]
        ends = student_encoder.end_token_id, teacher_encoder.end_token_id
        pair = ModelPair(widths, tokens[0], tokens[1], head, teacher.head, ends)
    loss = build_loss(args.method, args.loss_options, widths=widths, pair=pair)
    vocabularies = [encoder.tokenizer.get_vocab() for encoder in (student_encoder, teacher_encoder)]
    if loss.needs_same_vocabulary and vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"method {args.method} needs a teacher with the student's tokenizer, and theirs differ; "
            "dwa_kd and dskd with attention work across tokenizers"
        )
    return loss
