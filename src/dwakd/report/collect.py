"""Read the folders of runs and comparisons. A missing or damaged part is empty, and a note says what is damaged."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError
from transformers.trainer import TRAINER_STATE_NAME

from dwakd.compare.plan import Variant, is_teacher
from dwakd.errors import UserError, reason_of
from dwakd.evaluation.evaluate import Answer, Evaluation
from dwakd.recipe.files import RECIPE_FILE, read_saved_recipe
from dwakd.training.run_folder import RUN_FILE, flat_options

Value = TypeVar("Value")
_OF_MODELS = ("model", "data", "versions", "tokenizer", "chat_template", "dtype")
"""Parts of the signature of scores that may differ between runs that are compared."""
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file raises."""


class Run(NamedTuple):
    """What the folder of a run contains."""

    folder: Path
    name: str  # unique in the report
    row: str  # of a comparison; runs that differ in their training seed only have the same one
    recipe: str  # as YAML
    options: dict[str, Any]  # of the recipe, by dotted name
    record: dict[str, Any]  # versions, hardware and cost
    history: list[dict[str, Any]]  # what the trainer has logged
    evaluations: dict[str, Evaluation]  # by test set, with the answers

    @property
    def method(self) -> str:
        """The method, or the methods of a sum."""
        chosen = (value for name, value in self.options.items() if name.startswith("loss.") and name.endswith("method"))
        return " + ".join(map(str, chosen))


@dataclass(frozen=True)
class Distances:
    """Distances of a student's representations from the teacher's, one for each text."""

    cosine: list[float]
    product: list[float]


@dataclass
class Comparison:
    """What a report needs of comparison.json."""

    variants: dict[str, Any] = field(default_factory=dict)  # by row
    failures: dict[str, str] = field(default_factory=dict)  # reason by run


_DICT = TypeAdapter(dict[str, Any]).validate_python
_DISTANCES = TypeAdapter(dict[str, Distances]).validate_python
_COMPARISON, _EVALUATION = TypeAdapter(Comparison).validate_python, TypeAdapter(Evaluation).validate_python
_ANSWER = TypeAdapter(Answer).validate_json


@dataclass
class Collection:
    """Everything that a report shows, and the notes on what it cannot show."""

    runs: list[Run] = field(default_factory=list)
    similarity: dict[str, dict[str, Distances]] = field(default_factory=dict)  # by file and student
    notes: list[str] = field(default_factory=list)

    def read(self, path: Path, parse: Callable[[str], Value]) -> Value | None:
        """Parse the text of a file; return None if there is none, or if it is damaged, then with a note."""
        try:
            return parse(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValidationError as error:
            reason = "{}: {}".format(".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"])
        except DAMAGE as error:
            reason = reason_of(error)
        self.notes.append(f"{path} is left out because it is damaged ({reason})")
        return None


def collect(folders: Sequence[Path]) -> Collection:
    """Read runs and comparisons; the folder of a demo stands for its comparison.

    Raises:
        UserError: a folder does not exist, or contains neither a run nor a comparison.
    """
    found = Collection()
    runs: dict[Path, tuple[Path, str, str]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of a run or of a comparison")
        base = folder / "comparison" if (folder / "comparison" / "cells").is_dir() else folder
        name = base.resolve().name
        cells = _cells(base, found) if (base / "cells").is_dir() else [(base, name, name)]
        parts = (RECIPE_FILE, RUN_FILE, TRAINER_STATE_NAME, "eval")
        cells = [cell for cell in cells if any((cell[0] / part).exists() for part in parts)]
        if not cells:
            raise UserError(f"{folder} contains no run: give a folder that dwakd train or dwakd compare has written")
        runs |= {cell[0].resolve(): cell for cell in cells}
        for place in dict.fromkeys([base, *(path for path, *_ in cells)]):
            _add_similarity(place, found)
    counts = Counter(name for _, name, _ in runs.values())
    for path, name, row in runs.values():
        suffix = f" ({path})" if counts[name] > 1 else ""
        found.runs.append(_run(path, name + suffix, row + suffix, found))
    _check_sets(found)
    return found


def _check_sets(found: Collection) -> None:
    """Rename test sets of the same name but with other rows, so that nothing compares them; note other differences."""
    for name in dict.fromkeys(name for run in found.runs for name in run.evaluations):
        runs = [run for run in found.runs if name in run.evaluations]
        signatures = [run.evaluations[name].signature for run in runs]
        rows = [str(one.get("data", {}).get("sha256"))[:8] for one in signatures]
        names = dict.fromkeys(key for one in signatures for key in one if key not in _OF_MODELS)
        differing = [key for key in names if len({json.dumps(one.get(key)) for one in signatures}) > 1]
        if len(set(rows)) > 1:
            found.notes.append(f"the test set {name} has other rows in some runs, so these are shown as different sets")
            for run, digest in zip(runs, rows, strict=True):
                run.evaluations[f"{name} {digest}"] = run.evaluations.pop(name)
        elif differing:
            found.notes.append(
                f"the scores on {name} were computed with different values of {', '.join(differing)}, so they do not "
                "show differences of the models only"
            )


def _cells(folder: Path, found: Collection) -> list[tuple[Path, str, str]]:
    """Return folder, name and row of each run of a comparison, without those of the search for a learning rate."""
    summary = found.read(folder / "comparison.json", lambda text: _parse(_COMPARISON, text)) or Comparison()
    found.notes += [f"run {name} failed: {reason}" for name, reason in summary.failures.items()]
    rows = {Variant(name, {}).folder_name: name for name in summary.variants}
    cells = []
    for path in sorted(path for path in (folder / "cells").iterdir() if path.is_dir()):
        key, _, seed = path.name.rpartition("-")
        if is_teacher(teacher := path.name.replace("-", " ")):
            key, seed = teacher, ""
        if not rows or key in rows or is_teacher(key):
            cells.append((path, rows.get(key, key), seed))
    num_seeds = Counter(row for _, row, _ in cells)
    order = list(summary.variants)
    cells.sort(key=lambda cell: order.index(cell[1]) if cell[1] in order else len(order))
    return [(path, f"{row}, seed {seed}" if num_seeds[row] > 1 else row, row) for path, row, seed in cells]


def _run(folder: Path, name: str, row: str, found: Collection) -> Run:
    """Read a run. If it is not finished, its log is that of the last checkpoint."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    states = [one / TRAINER_STATE_NAME for one in (folder, *reversed(checkpoints))]
    state = next(filter(Path.is_file, states), folder)
    recipe = folder / RECIPE_FILE
    options = found.read(recipe, lambda _: flat_options(read_saved_recipe(recipe, fix="restore it"))) or {}
    evaluations = {}
    for path in sorted((folder / "eval").glob("*.json")):
        if evaluation := found.read(path, lambda text: _parse(_EVALUATION, text)):
            answers = found.read(path.with_suffix(".answers.jsonl"), _answers) or ()
            evaluations[path.stem] = replace(evaluation, answers=tuple(answers))
    for name in _outdated(folder, evaluations):
        found.notes.append(f"the scores of {folder} on {name} are left out: they are those of earlier weights")
        del evaluations[name]
    record = found.read(folder / RUN_FILE, lambda text: _parse(_DICT, text)) or {}
    history = found.read(state, lambda text: _parse(_DICT, text, strict=False)["log_history"]) or []
    history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    text = re.sub(r"(?m)^ *hub_token:.*\n", "", recipe.read_text(encoding="utf-8")) if options else ""
    options.pop("training.hub_token", None)  # a report is sent to others
    return Run(folder, name, row, text, options, record, history, evaluations)


def _outdated(folder: Path, evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return the test sets with scores of other weights than the newest scores, among those of the same dtype and device."""
    found: dict[str, tuple[tuple[str, str], str]] = {}
    for name in sorted(evaluations, key=lambda name: (folder / "eval" / f"{name}.json").stat().st_mtime):
        signature = evaluations[name].signature
        if isinstance(model := signature.get("model"), dict) and "sha256" in model:
            found[name] = (str(signature.get("dtype")), str(signature.get("device"))), model["sha256"]
    newest = dict(found.values())
    return [name for name, (kind, digest) in found.items() if digest != newest[kind]]


def _parse(validate: Callable[[Any], Value], text: str, *, strict: bool = True) -> Value:
    """Parse JSON; if `strict`, NaN and infinity raise ValueError."""
    content = json.loads(text)
    json.dumps(content, allow_nan=not strict)
    return validate(content)


def _answers(text: str) -> list[Answer]:
    return [_ANSWER(line) for line in text.split("\n") if line.strip()]


def _add_similarity(folder: Path, found: Collection) -> None:
    """Read the files of `dwakd similarity` in a folder."""
    for path in sorted(folder.glob("*.json")):
        if re.search(r'"students"\s*:\s*\{', path.read_text(encoding="utf-8", errors="replace")):
            students = found.read(path, lambda text: _DISTANCES(_parse(_DICT, text)["students"]))
            found.similarity |= {str(path): students} if students else {}
