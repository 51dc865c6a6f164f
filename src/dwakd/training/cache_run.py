"""What `dwakd cache` does: build, complete or verify the teacher cache of a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dwakd.cache.store import Cache, open_whole
from dwakd.config import Recipe, load_recipe
from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.models.loading import load_tokenizer
from dwakd.training.cached import CachedTeacher
from dwakd.training.inputs import encode_source
from dwakd.training.run import load_section, recipe_examples, training_config


def cache_recipe(recipe: Recipe, folder: str | Path | None = None, *, check: bool = False) -> Cache:
    """Build what is missing or damaged in a recipe's cache; with `check` only verify it.

    Args:
        recipe: of the training run.
        folder: of the cache, in place of `teacher.cache`.
        check: read everything, write nothing.

    Raises:
        UserError: no teacher, no folder, a cache that belongs to something else, a full disk; with `check` also a cache
            that isn't whole.
    """
    if recipe.teacher is None:
        raise UserError("there is nothing to cache without a teacher: add a teacher section to the recipe")
    folder = folder or recipe.teacher.cache
    if folder is None:
        raise UserError("teacher.cache is missing: name the cache's folder in the recipe, or with --output")
    args = training_config(recipe, "unused")
    train, evaluation = recipe_examples(recipe)
    student_tokenizer = load_tokenizer(
        recipe.student.model, revision=recipe.student.revision, trust_remote_code=recipe.student.trust_remote_code
    )
    teacher, _ = load_section(dataclasses.replace(recipe.teacher, cache=str(folder)))
    assert isinstance(teacher, CachedTeacher)
    encoder = TextEncoder(teacher.tokenizer, args.template, args.bos)
    encoders = (TextEncoder(student_tokenizer, args.template, args.bos), encoder)
    sets = {"train": encode_source(train, encoders, args, "train", recipe.data.train)[1]}
    if evaluation is not None:
        sets["eval"] = encode_source(evaluation, encoders, args, "eval", recipe.data.eval)[1]
    if check:
        return teacher.check(encoder, args, sets)
    teacher.prepare(encoder, args, sets, mend=True)
    return teacher.cache


def cache_command(path: Path, overrides: list[str], folder: Path | None, *, check: bool) -> str:
    """The command line's part: `path` is a recipe or, to check it alone, a cache's folder. Returns what to print."""
    if path.is_dir():
        if not check:
            raise UserError(f"{path} is a folder: name a recipe, or add --check to verify the cache in it")
        cache = open_whole(path, progress=True)
    else:
        cache = cache_recipe(load_recipe(path, overrides), folder, check=check)
    verb = "is whole" if check else "is ready; train from it with teacher.cache: " + str(cache.folder)
    return f"teacher cache {cache.folder} ({cache.describe()}) {verb}"
