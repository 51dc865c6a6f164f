"""Load and check the teachers of a trainer, and run them on the batches of an optimiser step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dwakd.batch import ModelSide, PairedBatch
from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.environment import widest_float
from dwakd.errors import UserError
from dwakd.losses import TeacherScale
from dwakd.models.head import num_embeddings
from dwakd.recipe.sections import check_teacher_key
from dwakd.recipe.training import DistillConfig
from dwakd.training.inputs import Model, check_named, check_tokenizer_type, load_pair, loading_options
from dwakd.training.student import check_separate
from dwakd.training.teacher import CachedTeacher, OnlineTeacher, Sets, Teacher

AnyTeacher: TypeAlias = str | Model | Teacher


class MicroBatch(NamedTuple):
    """A batch, and for each teacher its side of the batch and its statistics over the whole optimiser batch.

    With `teacher_key`, a side has only the rows that the teacher teaches, and is None if there are none.
    """

    batch: PairedBatch
    sides: tuple[ModelSide | None, ...] = ()
    scales: tuple[TeacherScale, ...] = ()


def load_teachers(
    student: Model,
    teachers: AnyTeacher | list[AnyTeacher] | None,
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    args: DistillConfig,
) -> list[tuple[Teacher, PreTrainedTokenizerBase]]:
    """Load and check the teachers; return each with its tokenizer. The list is empty if the method needs no teacher."""
    if not args.method_options.needs_teacher:
        return []
    given: list[Any] = teachers if isinstance(teachers, list) else [] if teachers is None else [teachers]
    if not given:
        raise UserError(f"method {args.method} needs a teacher: give teacher_model (recipe: teacher.model)")
    own = [None] * len(given) if tokenizers is None else tokenizers if isinstance(tokenizers, list) else [tokenizers]
    lists = {"teacher_weights": args.teacher_weights, "teacher_names": args.teacher_names}
    for name, values in {"teacher_processing_class": own, **lists}.items():
        if values is not None and len(values) != len(given):
            raise UserError(f"{name} must be a list of {len(given)} entries, one for each teacher, got {len(values)}")
    if args.teacher_cache is not None and len(given) > 1:
        raise UserError(
            "teacher_cache is for one teacher: give several as a list of dwakd.training.teacher.CachedTeacher"
        )
    if args.teacher_key is not None:
        names = args.teacher_names or list(map(str, range(1, len(given) + 1)))
        check_teacher_key(args.teacher_key, names, args.teacher_weights or [])
    check_named(args, "teacher_", given)
    return [_load(student, teacher, tokenizer, args) for teacher, tokenizer in zip(given, own, strict=True)]


def _load(
    student: Model, teacher: AnyTeacher, tokenizer: PreTrainedTokenizerBase | None, args: DistillConfig
) -> tuple[Teacher, PreTrainedTokenizerBase]:
    check_tokenizer_type(tokenizer, "teacher_processing_class")
    if args.teacher_cache is not None:
        options = loading_options(args, "teacher_")
        teacher = CachedTeacher(args.teacher_cache, teacher, tokenizer=tokenizer, **options)
    if not isinstance(teacher, Teacher):
        model, tokenizer = load_pair(teacher, tokenizer, args, "teacher_processing_class")
        check_separate(student, model)  # before the teacher is frozen
        teacher = OnlineTeacher(model)
    elif isinstance(teacher, OnlineTeacher):
        check_separate(student, teacher.model)
    teacher.check_method(args)
    tokenizer = tokenizer or teacher.tokenizer
    if tokenizer is None:
        raise UserError("teacher_processing_class is missing: a loaded teacher needs its tokenizer")
    return teacher, tokenizer


def make_encoders(
    sides: Sequence[tuple[Teacher | None, Any]], args: DistillConfig, student: Model | None = None
) -> tuple[TextEncoder, ...]:
    """Make the encoders of the student and of the teachers, given their tokenizers and the models that exist already.

    Chat templates print the date on which a teacher's cache was built, or else `template_date`. The student's prints that of
    the first teacher with a cache, because both sides must be truncated at the same characters as when the cache was built.
    """
    dates = [None if teacher is None else teacher.date for teacher, _ in sides]
    dates[0] = next(filter(None, dates), None)
    dates = [date or args.template_date for date in dates]
    tables = [num_embeddings(teacher.model) if isinstance(teacher, OnlineTeacher) else None for teacher, _ in sides]
    if student is not None:
        tables[0] = num_embeddings(student)
    options = args.template, args.bos, args.special_tokens_in_prompts
    return tuple(
        TextEncoder(tokenizer, *options, date=date, num_embeddings=rows)
        for (_, tokenizer), date, rows in zip(sides, dates, tables, strict=True)
    )


def run_teachers(
    batches: Sequence[PairedBatch], teachers: Sequence[Teacher], gather: Callable[[Tensor], Tensor] | None
) -> list[MicroBatch]:
    """Compute the teachers' sides of the micro-batches of one optimiser step, and their statistics over all of them.

    `gather` concatenates the tensors of all ranks, if there are several.
    """
    sides = [tuple(_side(teacher, batch, index) for index, teacher in enumerate(teachers)) for batch in batches]
    dtype = widest_float(batches[0].student.input_ids.device)
    none = batches[0].student.input_ids.new_zeros(3, 3, dtype=dtype)
    scales = []
    for own in zip(*sides, strict=True):
        weighted = [
            TeacherScale(none if side is None else TeacherScale.of(side).moments * batch.weight)
            for side, batch in zip(own, batches, strict=True)
        ]
        scale = TeacherScale.merge(weighted)
        if gather is not None:
            scale = TeacherScale.merge([TeacherScale(part) for part in gather(scale.moments[None])])
        scales.append(scale)
    return [MicroBatch(batch, own, tuple(scales)) for batch, own in zip(batches, sides, strict=True)]


def _side(teacher: Teacher, batch: PairedBatch, index: int) -> ModelSide | None:
    """Run a teacher on the rows of a batch that it teaches."""
    tokens = batch.teachers[index]
    if batch.chosen is None:
        return teacher.side(tokens)
    places = tuple(place for place, chosen in enumerate(batch.chosen) if chosen == index)
    if not places:
        return None
    return replace(teacher.side(tokens.examples(places, batch.student.num_rows)), places=places)


def sets_of_teacher(sets: Mapping[str, EncodedPairs | None], index: int) -> Sets:
    """Return the data sets of one of several teachers, with the rows that it teaches; sets without any are left out."""
    own = {role: pairs.of_teacher(index) for role, pairs in sets.items() if pairs is not None}
    return {role: pairs for role, pairs in own.items() if len(pairs)}
