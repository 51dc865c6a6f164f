"""Notice models and data of a comparison that have changed since its first run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from dwakd.answers.store import read_json
from dwakd.cache.fingerprint import adapter_digest, file_digest, weights_digest
from dwakd.errors import UserError
from dwakd.folders import write_json
from dwakd.recipe.recipe import Recipe

INPUTS = "inputs.json"
"""The digests of the models and the data, in the folder of a comparison."""


def check_inputs(folder: Path, recipes: Iterable[Recipe]) -> None:
    """Compare models and data of the rows with those of the first run, and store digests of those that are new.

    Only local files and folders are compared. The test sets are compared with the scores of each run.

    Raises:
        UserError: the content of a file or a model is another one than before.
    """
    known = read_json(folder / INPUTS)
    found: dict[str, str] = {}
    for recipe in recipes:
        for name, compute in _inputs(recipe):
            if name not in found:
                found[name] = compute()
    for name, digest in found.items():
        if known.get(name, digest) != digest:
            raise UserError(
                f"{name} has changed since the first run of the comparison in {folder}: restore it, choose another folder with "
                f"--output, or delete {folder / 'cells'} and {folder / INPUTS} to run all rows again"
            )
    if found.keys() - known.keys():
        write_json(folder / INPUTS, known | found)


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the option and the value of each local input, and a function that computes its digest."""
    for option, source in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        path = Path((source or "").partition("@")[0]).expanduser()
        if path.is_file():
            yield f"{option} {path}", partial(file_digest, path)
    teachers = [one for one in recipe.teachers if one.url is None]
    for option, section in (("student", recipe.student), *(("teacher", one) for one in teachers)):
        if Path(section.model).expanduser().is_dir():
            yield f"{option}.model {section.model}", partial(weights_digest, section.model)
        adapter = getattr(section, "adapter", None)
        if adapter is not None and Path(adapter).expanduser().is_dir():
            yield f"{option}.adapter {adapter}", partial(adapter_digest, adapter)
