"""Checks of options of different sections of a recipe together, which the trainer repeats for its own arguments."""

import json
from typing import Any

from dwakd.errors import UserError, explained
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


def check_method(args: Any, options: MethodOptions) -> None:
    """Raise UserError if a method cannot be trained with these arguments, which are a `DistillConfig`."""
    if args.padding_free:
        refuse_packed_attention(options)
    if args.lmbda and not options.supports_sampled:
        name = [part.method_name() for part in options.parts if not part.supports_sampled][-1]
        raise UserError(
            f"method {name} cannot train on the student's own answers (training.lmbda={args.lmbda:g}), because it trains "
            "models to predict the response: set lmbda to 0, or use another method such as alm"
        )
    if args.lmbda == 1 and options.needs_given:
        name = next(part.method_name() for part in options.parts if part.needs_given)
        raise UserError(f"method {name} needs some given responses to train its maps: set training.lmbda below 1")


def check_terms(args: Any, options: MethodOptions) -> None:
    """Raise UserError if `term_gradient_limit` has no terms to compare."""
    if term_names(options) == ("ce",):
        raise UserError(f"term_gradient_limit limits terms other than ce, but method {args.method} has none: remove it")
    if args.lmbda == 1 or not options.cross_entropy_weight:
        raise UserError("term_gradient_limit compares terms with ce, but the loss contains no ce: remove it")


def from_json(value: Any, name: str) -> Any:
    """Return the dict that a command line gives as JSON, as `HfArgumentParser` passes it on."""
    if not isinstance(value, str):
        return value
    with explained(f"{name} is not valid JSON"):
        found = json.loads(value)
    if not isinstance(found, dict):
        raise UserError(f'{name} must be a dict such as {{"name": 1}}, got {value!r:.80}')
    return found


_WITH_OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")
"""Beginnings of the names of optimisers that divide the parameters into groups, as the trainer does."""
_WITHOUT_ARGUMENTS = ("adafactor", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
"""Optimisers that ignore `optim_args`."""


def check_combinations(args: Any) -> None:
    """Raise UserError for options that have no effect, or that fail late, together with others."""
    if args.chat_template_path is not None and args.template != "chat":
        raise UserError(f"chat_template_path requires template='chat', got template={args.template!r}")
    optim, strategy = (str(getattr(value, "value", value)) for value in (args.optim, args.eval_strategy))
    if optim.startswith(_WITH_OWN_GROUPS):
        raise UserError(
            f"optim {optim} cannot be used, because it divides the parameters into groups itself: use another optim such as "
            "adamw_torch_fused"
        )
    if args.optim_args and optim in _WITHOUT_ARGUMENTS:
        fix = "leave it out" if optim == "adafactor" else "set adam_beta1, adam_beta2 and adam_epsilon"
        raise UserError(f"optim_args has no effect with optim={optim}: {fix}")
    if args.load_best_model_at_end and strategy == "no":
        raise UserError("load_best_model_at_end needs evaluations: set eval_strategy to steps or epoch")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("dataloader_persistent_workers requires dataloader_num_workers of at least 1")
