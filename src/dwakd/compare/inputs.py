"""Notice models and data of a comparison that have changed since its first run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dwakd.answers.store import read_json
from dwakd.cache.fingerprint import file_digest, json_digest
from dwakd.errors import UserError
from dwakd.folders import write_json
from dwakd.recipe.recipe import Recipe

INPUTS = "inputs.json"
"""The digests of the models and the data, in the folder of a comparison."""
_WEIGHTS = (".safetensors", ".bin")
_SETTINGS = ("config.json", "adapter_config.json")


def check_inputs(folder: Path, recipes: Iterable[Recipe]) -> None:
    """Compare models and data of the rows with those of the first run, and store digests of those that are new.

    Only local files and folders are compared. The test sets are compared with the scores of each run.

    Raises:
        UserError: the content of a file or a model is another one than before.
    """
    known = read_json(folder / INPUTS)
    found: dict[str, dict[str, Any]] = {}
    for name, files in (item for recipe in recipes for item in _inputs(recipe)):
        if name not in found:
            found[name] = _described(files, known.get(name, {}))
            if name in known and known[name]["digest"] != found[name]["digest"]:
                raise UserError(
                    f"{name} has changed since the first run of the comparison in {folder}: restore it, choose another folder "
                    "with --output, or delete this folder"
                )
    if any(known.get(name) != one for name, one in found.items()):
        write_json(folder / INPUTS, known | found)


def _described(files: list[Path], before: dict[str, Any]) -> dict[str, Any]:
    """Return sizes and times of files and a digest of their content, which is computed only if these have changed."""
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if before.get("stamp") == stamp:
        return before
    return {"stamp": stamp, "digest": json_digest([[path.name, file_digest(path)] for path in files])}


def _inputs(recipe: Recipe) -> Iterator[tuple[str, list[Path]]]:
    """Yield the option and the value of each local input, and its files."""
    for option, source in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        path = Path((source or "").partition("@")[0]).expanduser()
        if path.is_file():
            yield f"{option} {path}", [path]
    teachers = [one for one in recipe.teachers if one.url is None and recipe.loss.needs_teacher]
    for option, section in (("student", recipe.student), *(("teacher", one) for one in teachers)):
        for name in ("model", "adapter"):
            value = getattr(section, name, None)  # students have no adapter
            if value is not None and (folder := Path(value).expanduser()).is_dir():
                files = [one for one in folder.iterdir() if one.suffix in _WEIGHTS or one.name in _SETTINGS]
                yield f"{option}.{name} {folder}", sorted(files)
