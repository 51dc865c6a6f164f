"""The teachers that a trainer is given: loaded, checked, and run ahead of the step."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dwakd.batch import ModelSide
from dwakd.data.collator import PairedCollator, SeveralCollators
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import EncodedPairs
from dwakd.errors import UserError
from dwakd.losses import TeacherScale, method_class
from dwakd.training.cached import CachedTeacher, refuse_attention
from dwakd.training.config import DistillConfig
from dwakd.training.inputs import Model, load_pair, make_encoder
from dwakd.training.student import check_separate
from dwakd.training.teacher import OnlineTeacher, Teacher

AnyTeacher: TypeAlias = str | Model | Teacher


def prepare_teachers(
    student: Model,
    teachers: AnyTeacher | list[AnyTeacher] | None,
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    args: DistillConfig,
) -> list[tuple[Teacher, TextEncoder]]:
    """Each teacher with its encoder; none for a method that needs none.

    Raises:
        UserError: no teacher where one is needed, a teacher that shares parameters with the student, a teacher without a
            tokenizer, another number of tokenizers or weights than of teachers, one cache for several teachers, or a cache
            for a method that reads attention.
    """
    if not method_class(args.method).options_type.needs_teacher:
        return []
    given: list[Any] = teachers if isinstance(teachers, list) else [] if teachers is None else [teachers]
    if not given:
        raise UserError(f"method {args.method} needs a teacher: give teacher_model (recipe: teacher.model)")
    beside = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(given)
    if len(beside) != len(given) or (len(given) > 1 and isinstance(tokenizers, PreTrainedTokenizerBase)):
        raise UserError(f"teacher_processing_class must be a list of {len(given)} tokenizers, one for each teacher")
    if args.teacher_weights is not None and len(args.teacher_weights) != len(given):
        raise UserError(f"teacher_weights must be a list of {len(given)} numbers, one for each teacher")
    if args.teacher_cache is not None and len(given) > 1:
        raise UserError(
            "teacher_cache is for one teacher: give each of several as a dwakd.training.cached.CachedTeacher"
        )
    return [_prepare(student, teacher, tokenizer, args) for teacher, tokenizer in zip(given, beside, strict=True)]


def _prepare(
    student: Model, teacher: AnyTeacher, tokenizer: PreTrainedTokenizerBase | None, args: DistillConfig
) -> tuple[Teacher, TextEncoder]:
    if args.teacher_cache is not None:
        remote = args.trust_remote_code
        teacher = CachedTeacher(args.teacher_cache, teacher, tokenizer=tokenizer, trust_remote_code=remote)
    if isinstance(teacher, CachedTeacher):
        refuse_attention(args.method, args.loss_options)
    if not isinstance(teacher, Teacher):
        model, tokenizer = load_pair(teacher, tokenizer, args, "teacher_processing_class")
        check_separate(student, model)
        teacher = OnlineTeacher(model)
    elif isinstance(teacher, OnlineTeacher):
        check_separate(student, teacher.model)
    tokenizer = tokenizer or teacher.tokenizer
    if tokenizer is None:
        raise UserError("teacher_processing_class is missing: give the teacher's tokenizer beside it")
    return teacher, make_encoder(tokenizer, args, teacher.date)


def tell_teachers(
    teachers: list[tuple[Teacher, TextEncoder]], args: DistillConfig, sets: dict[str, EncodedPairs | None]
) -> None:
    """Tell each teacher what will be asked of it, `Teacher.prepare`."""
    for index, (teacher, encoder) in enumerate(teachers):
        own = {role: None if pairs is None else pairs.of_teacher(index) for role, pairs in sets.items()}
        teacher.prepare(encoder, args, own)


def batch_collator(encoders: Sequence[TextEncoder], teachers: Sequence[Teacher]) -> Callable[..., dict[str, Any]]:
    """What makes batches of pairs, given the encoders of the student and of each teacher."""
    student, *others = (encoder.tokenizer.pad_token_id for encoder in encoders)
    collators = [teacher.collator(PairedCollator(student, pad)) for teacher, pad in zip(teachers, others, strict=True)]
    if len(collators) > 1:
        return SeveralCollators(collators)
    return collators[0] if collators else PairedCollator(student)


def attach_rows(
    batches: list[dict[str, Any]], teachers: Sequence[Teacher], gather: Callable[[Tensor], Tensor] | None
) -> None:
    """Attach the teachers' rows to each batch, and of each one set of moments over all of them and all ranks.

    Args:
        batches: micro-batches of one optimiser step.
        teachers: none, one or several.
        gather: from all ranks, if there are several.
    """
    if not teachers:
        return
    rows = [
        [teacher.rows(part) for teacher, part in zip(teachers, [batch, *batch.get("others", [])], strict=True)]
        for batch in batches
    ]
    shares = [batch["share"] for batch in batches]
    scales = [_scale(list(sides), shares, gather) for sides in zip(*rows, strict=True)]
    alone = len(teachers) == 1
    for batch, sides in zip(batches, rows, strict=True):
        batch["teacher"], batch["teacher_scale"] = (sides[0], scales[0]) if alone else (sides, scales)


def _scale(sides: list[ModelSide], shares: list[float], gather: Callable[[Tensor], Tensor] | None) -> TeacherScale:
    """Of one teacher's rows of an optimiser batch."""
    scale = TeacherScale.merge(
        [TeacherScale(TeacherScale.of(side).moments * share) for side, share in zip(sides, shares, strict=True)]
    )
    if gather is None:
        return scale
    return TeacherScale.merge([TeacherScale(part) for part in gather(scale.moments[None])])
