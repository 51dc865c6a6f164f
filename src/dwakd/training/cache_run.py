"""The command `dwakd cache`: build, complete or verify the teacher caches of a recipe."""

from __future__ import annotations

from pathlib import Path

from dwakd.cache.store import Cache, open_complete
from dwakd.errors import UserError
from dwakd.recipe.checks import check_stream
from dwakd.recipe.recipe import Recipe, load_recipe
from dwakd.training.inputs import encode_source
from dwakd.training.run import open_section, recipe_encoders, recipe_examples, train_name, training_config
from dwakd.training.teacher import CachedTeacher
from dwakd.training.teachers import sets_of_teacher


def cache_recipe(
    recipe: Recipe, folder: str | Path | None = None, *, check: bool = False, engine: str = "transformers"
) -> list[Cache]:
    """Build what is missing or damaged in the caches of a recipe's teachers.

    Args:
        recipe: recipe of the training run. Teachers without a cache are skipped if another teacher has one.
        folder: folder of the cache of a single teacher; overrides `teacher.cache`.
        check: read and verify everything, write nothing, and refuse an incomplete or damaged cache.
        engine: what runs the teachers, `transformers` or `vllm`.
    """
    if not recipe.teachers:
        raise UserError("dwakd cache requires a teacher: add a teacher section to the recipe")
    if folder is not None and len(recipe.teachers) > 1:
        raise UserError(
            "--output names one folder, but the recipe has several teachers: set cache for each teacher in the recipe"
        )
    folders = [folder or section.cache for section in recipe.teachers]
    served = [section.url is not None for section in recipe.teachers]
    if not any([*folders, *served]):
        raise UserError(
            "teacher.cache is missing: name the folder of a teacher's cache in the recipe (or with --output)"
        )
    if engine != "transformers" and (check or any(served)):
        raise UserError("--engine has no effect with --check or teacher.url: leave it out")
    args = training_config(recipe, "unused")
    check_stream(args, folders)
    train, evaluation = recipe_examples(recipe)
    if args.lmbda == 1 and any(served) and evaluation is None:
        raise UserError(
            "there is nothing to store: with training.lmbda: 1 the student answers every prompt of the recipe"
        )
    pairs = zip(recipe.teachers, folders, strict=True)
    sections = [section.model_copy(update={"cache": place and str(place)}) for section, place in pairs]
    sides = [open_section(section) for section in (recipe.student, *sections)]
    encoders = recipe_encoders((recipe.student, *sections), sides, args)
    sources = {"train": (train, train_name(recipe)), "eval": (evaluation, recipe.data.eval)}
    sets = {role: encode_source(rows, encoders, args, role, name)[1] for role, (rows, name) in sources.items()}
    caches = []
    for index, ((teacher, _), encoder) in enumerate(zip(sides[1:], encoders[1:], strict=True)):
        if not isinstance(teacher, CachedTeacher):
            continue
        own = sets_of_teacher(sets, index)
        if not check:
            teacher.engine = engine
            teacher.prepare(encoder, args, own, repair=True)
        caches.append(teacher.check(encoder, args, own) if check else teacher.cache)
    return caches


def cache_command(path: Path, overrides: list[str], folder: Path | None, engine: str, *, check: bool) -> str:
    """Run `cache_recipe` on a recipe file, or verify the cache in a folder; return the text to print."""
    if path.is_dir():
        if not check:
            raise UserError(f"{path} is a folder: give a recipe, or add --check to verify the cache in it")
        caches = [open_complete(path, progress=True)]
    else:
        caches = cache_recipe(load_recipe(path, overrides, "cache"), folder, check=check, engine=engine)
    result = "is complete" if check else "is ready; train from it with teacher.cache: {}"
    return "\n".join(
        f"teacher cache {cache.folder} ({cache.describe()}) {result.format(cache.folder)}" for cache in caches
    )
