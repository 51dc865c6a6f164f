"""Encode rows for two models and run both on a batch, for training loops other than `DistillTrainer`."""

from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel

from dwakd.batch import ModelSide, OutputHead, PairedBatch
from dwakd.cache.fingerprint import json_digest, tokenizer_digest
from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import align_by_spelling, encode_pairs
from dwakd.data.sources import load_examples
from dwakd.losses import ModelPair, Widths
from dwakd.models.head import embedding_table, output_head
from dwakd.models.rows import evaluating, response_side, select_side, teacher_states

Model: TypeAlias = PreTrainedModel | PeftModel


def encode_rows(
    rows: Any,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    template: str = "alpaca",
    supervise: str = "last",
    max_length: int = 512,
    max_prompt_length: int = 256,
    edit_alignment: bool = False,
) -> EncodedPairs:
    """Encode prompts and responses with the tokenizers of student and teacher.

    The result is a torch data set. Batches of its items, made by `dwakd.collate`, are the input of `paired_sides`.

    Args:
        rows: a list of rows with prompt and response, a `datasets.Dataset`, or another source of `load_examples`.
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: a fast tokenizer of transformers.
        template: `chat`, another name of a template, or a format string with {instruction} and {input}.
        supervise: `last` trains on the last assistant turn of a conversation, `all` on each of them.
        max_length: maximum number of tokens of prompt and response. Longer responses are truncated.
        max_prompt_length: maximum number of tokens of the prompt.
        edit_alignment: also align the tokens by their spelling, which `min_ed` needs.

    Raises:
        UserError: a row is invalid, or a tokenizer cannot be used.
    """
    encoders = [TextEncoder(tokenizer, template) for tokenizer in (student_tokenizer, teacher_tokenizer)]
    examples = load_examples(rows, name="rows", supervise=supervise)
    options: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length, "source": "rows"}
    pairs = encode_pairs(examples, *encoders, **options)
    if edit_alignment:
        align_by_spelling(pairs, *encoders)
    return pairs


def paired_sides(
    student: Model, teacher: Model, batch: PairedBatch, *, attention: bool = False
) -> tuple[ModelSide, ModelSide]:
    """Run student and teacher on a batch. The two sides are the input of every loss.

    The student runs in its current mode and its side carries gradient. The teacher runs in eval mode without gradient.

    Args:
        student: the student, on the device of the batch.
        teacher: the teacher, on the device of the batch.
        batch: a batch of `dwakd.collate`.
        attention: whether the sides have attention, for losses whose `needs_attention` is true.
    """
    (tokens,) = batch.teachers
    with evaluating(teacher):
        states = teacher_states(teacher, tokens, attention=attention)
    teacher_side = select_side(tokens, *states, embedding_table(teacher).detach(), output_head(teacher).detached())
    return response_side(student, batch.student, attention=attention), teacher_side


def model_pair(
    student: Model, teacher: Model, student_tokenizer: Any, teacher_tokenizer: Any, *, template: str = "alpaca"
) -> ModelPair:
    """Return what methods that compare vocabularies need of two models: heads, tokens and widths.

    Args:
        student: the student. Methods that start from its output head use it as it is now.
        teacher: the teacher.
        student_tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: a fast tokenizer of transformers.
        template: as in `encode_rows`.
    """
    encoders = TextEncoder(student_tokenizer, template), TextEncoder(teacher_tokenizer, template)
    own, theirs = output_head(student).detached(), output_head(teacher).detached()
    heads = own, theirs.to(own.weight.device)
    return pair_of(model_widths(student, teacher), heads, encoders)


def pair_of(
    widths: Widths, heads: tuple[OutputHead, OutputHead], encoders: tuple[TextEncoder, TextEncoder]
) -> ModelPair:
    """Return the pair of a student and a teacher with these heads and encoders."""
    own, theirs = encoders
    return ModelPair(
        widths,
        own.token_bytes()[: heads[0].vocab_size],  # tokens without an embedding have no logits either
        theirs.token_bytes()[: heads[1].vocab_size],
        *heads,
        end_tokens=(own.end_token_id, theirs.end_token_id),
        spell=(own.spell, theirs.spell),
        spelling=json_digest([tokenizer_digest(own), tokenizer_digest(theirs)]),
    )


def model_widths(student: Model, teacher: Model) -> Widths:
    """Return the widths of two models, which losses with projectors need."""
    hidden = (output_head(model).hidden_size for model in (student, teacher))
    return Widths(*hidden, *(embedding_table(model).shape[1] for model in (student, teacher)))
