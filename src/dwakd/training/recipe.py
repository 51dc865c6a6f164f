"""A recipe's sections as what transformers, PEFT and the trainer take, every option checked."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dwakd.config import Recipe, StudentSection, TeacherSection
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.losses import method_class, method_options
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.options import check_type
from dwakd.training.config import DistillConfig
from dwakd.training.optimizer import check_optimizer
from dwakd.training.teacher import CachedTeacher, refuse_attention
from dwakd.validation import unknown_option

ELSEWHERE = ("method", "loss_options", "output_dir", "trust_remote_code", "teacher_cache", "teacher_weights")
IGNORED = ("resume_from_checkpoint", "do_train", "do_eval", "do_predict")
DATA_FIELDS = ("template", "bos", "special_tokens_in_prompts", "max_length", "max_prompt_length", "invalid_rows")


def training_config(recipe: Recipe, output_dir: str | Path) -> DistillConfig:
    """The recipe's `training` section as a DistillConfig; its `data` and `loss` sections filled in.

    Raises:
        UserError: an unknown option, one that belongs to another section, or a value transformers refuses.
    """
    valid = [item.name for item in dataclasses.fields(DistillConfig) if item.init]
    hints = typing.get_type_hints(DistillConfig)
    for name in recipe.training:
        if name in (*DATA_FIELDS, *ELSEWHERE):
            raise UserError(f"training.{name} belongs elsewhere: in data, loss, student, teacher, or --output")
        if name in IGNORED:
            hint = "go on with a run by --resume" if name == "resume_from_checkpoint" else "leave it out"
            raise UserError(f"training.{name} has no effect here; {hint}")
        if name not in valid:
            raise unknown_option(f"training.{name}", name, valid)
        check_type(hints[name], recipe.training[name], f"training.{name}")
    options = dict(recipe.training)
    if recipe.data.eval is not None:
        options.setdefault("eval_strategy", "epoch")
    for name in ("eval_strategy", "eval_rouge_l", "load_best_model_at_end", "metric_for_best_model"):
        if recipe.data.eval is None and options.get(name) not in (None, False, "no"):
            raise UserError(f"training.{name} needs an evaluation set: give data.eval")
    if recipe.data.eval is None and options.get("save_strategy") == "best":
        raise UserError("training.save_strategy=best needs an evaluation set: give data.eval")
    _check_best_metric(recipe, options)
    try:
        return DistillConfig(
            output_dir=str(output_dir),
            method=recipe.method,
            loss_options=recipe.loss_options,
            teacher_weights=[teacher.weight for teacher in recipe.teachers] if len(recipe.teachers) > 1 else None,
            **{name: getattr(recipe.data, name) for name in DATA_FIELDS},
            **{"save_strategy": options.get("eval_strategy", "epoch"), **options},
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        hint = "; on a machine without a GPU set training.use_cpu=true" if "use_cpu" in str(error) else ""
        raise UserError(f"training options: {' '.join(str(error).split())}{hint}") from error


def _check_best_metric(recipe: Recipe, options: dict[str, Any]) -> None:
    """An unknown metric would show only after the first evaluation."""
    if "metric_for_best_model" not in options:
        return
    terms = (*method_class(recipe.method).terms, "loss", "bits_per_byte")
    valid = [*terms, "rouge_l"] if options.get("eval_rouge_l") else list(terms)
    name = options["metric_for_best_model"].removeprefix("eval_")
    if name not in valid:
        hint = " with training.eval_rouge_l=true" if name == "rouge_l" else ""
        raise UserError(
            f"unknown training.metric_for_best_model {name}{hint and ', which exists' + hint}; valid ones: "
            + ", ".join(valid)
        )


def load_section(section: StudentSection | TeacherSection) -> tuple[Any, Any]:
    """The model (or the cached teacher) and the tokenizer of a section."""
    dtype = getattr(torch, section.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"unknown dtype {section.dtype!r} for {section.model}; float32, bfloat16 and float16 are known")
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
    adapter = getattr(section, "adapter", None)
    if isinstance(section, TeacherSection) and section.cache is not None:
        stored = section.cache_dtype
        teacher = CachedTeacher(
            section.cache, section.model, adapter=adapter, dtype=dtype, cache_dtype=stored, **options
        )
        return teacher, teacher.tokenizer
    return (
        load_causal_lm(section.model, dtype=dtype, adapter=adapter, **options),
        load_tokenizer(section.model, **options),
    )


def _peft_config(options: dict[str, Any] | None) -> LoraConfig | None:
    if options is None:
        return None
    valid = [item.name for item in dataclasses.fields(LoraConfig)]
    hints = typing.get_type_hints(LoraConfig)
    for name in options:
        if name not in valid:
            raise unknown_option(f"student.peft.{name}", name, valid)
        check_type(hints[name], options[name], f"student.peft.{name}")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **options})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"student.peft: {error}") from error


def recipe_examples(recipe: Recipe) -> tuple[list[Example], list[Example] | None]:
    """The rows to train on and, if there are any, to evaluate on."""
    data = recipe.data
    if data.eval_limit is not None and data.eval_limit < 1:
        raise UserError(f"data.eval_limit must be at least 1, got {data.eval_limit}")
    options: dict[str, Any] = {"prompt": data.prompt, "response": data.response, "input": data.input}
    options["invalid_rows"] = data.invalid_rows
    train = load_examples(data.train, split=TRAIN_SPLITS, limit=data.limit, **options)
    if data.eval is None:
        return train, None
    return train, load_examples(data.eval, split=EVAL_SPLITS, limit=data.eval_limit, **options)


def check_options(recipe: Recipe, output_dir: str | Path) -> tuple[DistillConfig, LoraConfig | None]:
    """The training arguments and adapter of a recipe, every option checked; reads no data and no model."""
    if method_options(recipe.method, recipe.loss_options).needs_teacher and not recipe.teachers:
        raise UserError(f"method {recipe.method} needs a teacher: add a teacher section to the recipe")
    for teacher in recipe.teachers:
        if not 0 < teacher.weight < math.inf:
            raise UserError(f"teacher.weight must be a number above 0, got {teacher.weight!r}")
    if any(teacher.cache is not None for teacher in recipe.teachers):
        refuse_attention(recipe.method, recipe.loss_options)
    args = training_config(recipe, output_dir)
    check_optimizer(args)
    return args, _peft_config(recipe.student.peft)
