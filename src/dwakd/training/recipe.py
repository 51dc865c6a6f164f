"""Build from a validated recipe what transformers and the trainer take: arguments, models and rows."""

from pathlib import Path
from typing import Any

import torch

from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import DataSection, StudentSection, TeacherSection
from dwakd.recipe.training import DATA_OPTIONS, DistillConfig
from dwakd.training.optimizer import check_optimizer
from dwakd.training.teacher import CachedTeacher


def training_config(recipe: Recipe, output_dir: str | Path) -> DistillConfig:
    """Return the training arguments of a recipe.

    Raises:
        UserError: transformers refuses an option.
    """
    options = dict(recipe.training)
    if recipe.data.eval is not None:
        options.setdefault("eval_strategy", "epoch")
    options.setdefault("save_strategy", options.get("eval_strategy", "epoch"))
    try:
        return DistillConfig(
            output_dir=str(output_dir),
            method=recipe.method,
            loss_options=recipe.loss_options,
            teacher_weights=[teacher.weight for teacher in recipe.teachers] if len(recipe.teachers) > 1 else None,
            **recipe.data.model_dump(include=set(DATA_OPTIONS)),
            **options,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        hint = "; on a machine without a GPU set training.use_cpu=true" if "use_cpu" in str(error) else ""
        raise UserError(f"training options: {' '.join(str(error).split())}{hint}") from error


def check_options(recipe: Recipe, output_dir: str | Path) -> DistillConfig:
    """Return the training arguments of a recipe, with an optimiser and a schedule that can be built.

    Raises:
        UserError: transformers or another package refuses an option.
    """
    args = training_config(recipe, output_dir)
    check_optimizer(args)
    return args


def load_section(section: StudentSection | TeacherSection) -> tuple[Any, Any]:
    """Load the model of a section, or open its cache, and load its tokenizer."""
    dtype = getattr(torch, section.dtype)
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
    adapter = section.adapter if isinstance(section, TeacherSection) else None
    if isinstance(section, TeacherSection) and section.cache is not None:
        stored = section.cache_dtype
        teacher = CachedTeacher(
            section.cache, section.model, adapter=adapter, dtype=dtype, cache_dtype=stored, **options
        )
        return teacher, teacher.tokenizer
    model = load_causal_lm(section.model, dtype=dtype, adapter=adapter, **options)
    return model, load_tokenizer(section.model, **options)


def recipe_examples(data: DataSection) -> tuple[list[Example], list[Example] | None]:
    """Read the rows to train on and, if the recipe has an evaluation set, those to evaluate on."""
    options: dict[str, Any] = data.model_dump(include={"prompt", "response", "input", "invalid_rows"})
    train = load_examples(data.train, split=TRAIN_SPLITS, limit=data.limit, **options)
    if data.eval is None:
        return train, None
    return train, load_examples(data.eval, split=EVAL_SPLITS, limit=data.eval_limit, **options)
