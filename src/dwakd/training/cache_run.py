"""What `dwakd cache` does: build, complete or verify the teacher cache of a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dwakd.cache.store import Cache, open_whole
from dwakd.config import Recipe, StudentSection, TeacherSection, load_recipe
from dwakd.errors import UserError
from dwakd.models.loading import load_tokenizer
from dwakd.training.cached import refuse_attention
from dwakd.training.inputs import encode_source, make_encoder
from dwakd.training.recipe import load_section, recipe_examples, training_config


def cache_recipe(recipe: Recipe, folder: str | Path | None = None, *, check: bool = False) -> list[Cache]:
    """Build what is missing or damaged in the caches of a recipe's teachers; with `check` only verify them.

    Args:
        recipe: of the training run.
        folder: of the cache of a single teacher, in place of `teacher.cache`. Of several, those with a cache are built.
        check: read everything, write nothing.

    Raises:
        UserError: no teacher, no folder, a cache that belongs to something else, a full disk; with `check` also a cache
            that isn't whole.
    """
    if not recipe.teachers:
        raise UserError("there is nothing to cache without a teacher: add a teacher section to the recipe")
    if folder is not None and len(recipe.teachers) > 1:
        raise UserError("--output names one folder: with several teachers, give each its cache in the recipe")
    folders = [folder or section.cache for section in recipe.teachers]
    if not any(folders):
        where = "or with --output" if len(folders) == 1 else "for one of the teachers at least"
        raise UserError(f"teacher.cache is missing: name the cache's folder in the recipe, {where}")
    args = training_config(recipe, "unused")
    train, evaluation = recipe_examples(recipe)
    teachers = [
        None if place is None else load_section(dataclasses.replace(section, cache=str(place)))[0]
        for section, place in zip(recipe.teachers, folders, strict=True)
    ]
    sections: list[StudentSection | TeacherSection] = [recipe.student, *recipe.teachers]
    tokenizers = [
        load_tokenizer(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
        for section in sections
    ]
    dates = [None if teacher is None else teacher.date for teacher in teachers]
    dates = [next(filter(None, dates), None), *dates]  # the student's text may be cut to the same characters again
    encoders = tuple(make_encoder(tokenizer, args, date) for tokenizer, date in zip(tokenizers, dates, strict=True))
    sets = {"train": encode_source(train, encoders, args, "train", recipe.data.train)[1]}
    if evaluation is not None:
        sets["eval"] = encode_source(evaluation, encoders, args, "eval", recipe.data.eval)[1]
    caches = []
    for index, (teacher, encoder) in enumerate(zip(teachers, encoders[1:], strict=True)):
        if teacher is None:
            continue
        own = {role: pairs.of_teacher(index) for role, pairs in sets.items() if pairs is not None}
        if not check:
            teacher.prepare(encoder, args, own, mend=True)
        caches.append(teacher.check(encoder, args, own) if check else teacher.cache)
    return caches


def cache_command(path: Path, overrides: list[str], folder: Path | None, *, check: bool) -> str:
    """The command line's part: `path` is a recipe or, to check it alone, a cache's folder. Returns what to print."""
    if path.is_dir():
        if not check:
            raise UserError(f"{path} is a folder: name a recipe, or add --check to verify the cache in it")
        caches = [open_whole(path, progress=True)]
    else:
        recipe = load_recipe(path, overrides)
        if recipe.compare is None:  # a comparison caches for its other methods
            refuse_attention(recipe.method, recipe.loss_options)
        caches = cache_recipe(recipe, folder, check=check)
    verb = "is whole" if check else "is ready; train from it with teacher.cache: "
    return "\n".join(
        f"teacher cache {cache.folder} ({cache.describe()}) {verb}{'' if check else cache.folder}" for cache in caches
    )
