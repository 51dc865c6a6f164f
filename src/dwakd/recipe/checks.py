"""Checks of options of different sections of a recipe together, which the trainer repeats for its own arguments."""

from typing import Any

from dwakd.errors import UserError
from dwakd.losses import MethodOptions
from dwakd.losses.weighted_sum import term_names


def metric_names(method: MethodOptions, *, rouge_l: bool) -> list[str]:
    """Return the names of the metrics of an evaluation, without their prefix `eval_`."""
    return [*term_names(method), "loss", "bits_per_byte", *(["rouge_l"] if rouge_l else [])]


def check_best_metric(metric: str, method: MethodOptions, *, rouge_l: bool) -> None:
    """Raise UserError if no evaluation reports the metric by which the best checkpoint is chosen."""
    name, valid = metric.removeprefix("eval_"), metric_names(method, rouge_l=rouge_l)
    if name not in valid:
        hint = "requires training.eval_rouge_l=true; other" if name == "rouge_l" else "is unknown;"
        raise UserError(f"training.metric_for_best_model {name} {hint} valid ones: {', '.join(valid)}")


def refuse_cached_sampling(lmbda: float) -> None:
    """Raise UserError if the teacher reads the student's answers, which a cache does not contain."""
    if lmbda:
        raise UserError(
            f"training.lmbda is {lmbda:g}, but a teacher cache does not contain the student's answers: train without "
            "teacher.cache"
        )


def check_stream(args: Any, cache: object) -> None:
    """Raise UserError if the rows to train on are a stream and an option, or a teacher cache, needs all of them."""
    if not args.streaming:
        return
    if args.max_steps < 1:
        raise UserError(
            "data.streaming requires training.max_steps, because the number of rows of a stream is not known"
        )
    if args.train_sampling_strategy == "group_by_length":
        raise UserError("training.train_sampling_strategy: group_by_length needs all rows: set data.streaming: false")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise UserError(
                f"training.{name}: epoch has no effect with data.streaming, which has no epochs: set it to steps"
            )
    if cache is not None:
        raise UserError(
            "a teacher cache needs all rows: train without teacher.cache and teacher.url, or set data.streaming: false"
        )


def refuse_cached_attention(options: MethodOptions) -> None:
    """Raise UserError if the method reads the teacher's attention, which a cache does not contain."""
    _refuse_attention(options, "the teacher's attention, which a cache does not contain", "train without teacher.cache")


def refuse_packed_attention(options: MethodOptions) -> None:
    """Raise UserError if the method reads the attention of the models, which is not available for packed rows."""
    _refuse_attention(
        options, "attention, which training.padding_free does not compute", "set training.padding_free=false"
    )


def _refuse_attention(options: MethodOptions, what: str, fix: str) -> None:
    for number, part in enumerate(options.parts, start=1):
        if part.needs_attention:
            prefix = "loss." if part is options else f"loss.{number}."
            raise UserError(f"method {part.method_name()} reads {what}; set {prefix}span_weights=uniform, or {fix}")
