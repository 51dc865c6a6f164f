"""Read the answers of two runs and pair those to the same prompt."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwakd.data.turns import checked_text
from dwakd.errors import UserError, explained
from dwakd.judge.options import JudgeOptions

logger = logging.getLogger(__name__)

_SUFFIX = ".answers.jsonl"
_COLUMNS = (("question", "prompt", "instruction"), ("answer", "completion", "response", "output"))
_FIX = "answer the same --data with dwakd eval"


class Pair(NamedTuple):
    """The answers of A and B to one prompt. `first` says whose answer the judge reads first: 0 for A, 1 for B."""

    test_set: str
    question: str
    answers: tuple[str, str]
    first: int


def read_pairs(places: Sequence[Path], options: JudgeOptions) -> list[Pair]:
    """Pair the answers in two folders with results of `dwakd eval`, or in two jsonl files, by the text of the prompt.

    With a larger `limit`, the pairs of a smaller one and their order stay the same.

    Raises:
        UserError: a place has no such answers, or the two have no test set or no prompt in common.
    """
    a, b = map(_answer_files, places)
    if len(a) == len(b) == 1:
        b = dict(zip(a, b.values(), strict=True))
    if not (shared := [name for name in a if name in b]):
        sets = f"{places[0]} has answers to the test sets {', '.join(a)}, but {places[1]} to {', '.join(b)}"
        raise UserError(f"{sets}: {_FIX}")
    pairs: list[Pair] = []
    for name in shared:
        paths = a[name], b[name]
        (of_a, *temperature), (of_b, *other) = (_read_answers(path, options.answers_seed) for path in paths)
        if None not in (*temperature, *other) and temperature != other:
            raise UserError(
                f"{paths[0]} was sampled at temperature {temperature[0]}, but {paths[1]} at {other[0]}: compare greedy "
                "answers by leaving out --answers-seed, or answer one of them again"
            )
        if not (common := [key for key in of_a if key in of_b]):
            raise UserError(f"{paths[0]} and {paths[1]} have no prompt in common: {_FIX}")
        if unmatched := len(of_a) + len(of_b) - 2 * len(common):
            logger.warning("%s: %d answers are left out, whose prompts the other run has not answered", name, unmatched)
        rng = np.random.default_rng(options.seed)
        drawn, first = sorted(rng.permutation(len(common))[: options.limit]), rng.integers(2, size=len(common))
        found = [Pair(name, common[i][0], (of_a[common[i]], of_b[common[i]]), int(first[i])) for i in drawn]
        for side, path in enumerate(paths):
            if not any(pair.answers[side] for pair in found):
                raise UserError(f"all answers in {path} are empty: check the template and the model with dwakd eval")
        pairs += found
    return pairs


def _answer_files(place: Path) -> dict[str, Path]:
    """Return the files of answers by the name of the test set."""
    if place.is_file():
        return {place.name.removesuffix(".jsonl").removesuffix(".answers"): place}
    for folder in (place / "eval", place):
        if files := sorted(folder.glob(f"*{_SUFFIX}")):
            return {path.name.removesuffix(_SUFFIX): path for path in files}
    what = "contains no answers" if place.is_dir() else "does not exist"
    raise UserError(f"{place} {what}: name a folder with results of dwakd eval, or a jsonl file of prompts and answers")


def _read_answers(path: Path, seed: int | None) -> tuple[dict[tuple[str, int], str], float | None]:
    """Return the answers of one pass by the prompt and how often it occurred before, and the first temperature."""
    passes: dict[tuple[Any, Any], dict[tuple[str, int], str]] = {}
    seen: Counter[Any] = Counter()
    for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
        place = f"{path}, line {number}"
        with explained(f"{place} is not a JSON object"):
            row = json.loads(line)
            one = row.get("seed"), row.get("temperature")
        if any(isinstance(value, list | dict) for value in one):
            raise UserError(f"{place}: seed and temperature must be numbers or null: correct or remove them")
        texts: list[Any] = [next((row[name] for name in names if name in row), None) for names in _COLUMNS]
        for text, names in zip(texts, _COLUMNS, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{place} has no text in any column of {', '.join(names)}: add one of them")
        question, answer = (checked_text(text, f"the text of {place}").strip() for text in texts)
        if "question" not in row and isinstance(row.get("input"), str) and row["input"].strip():
            question += f"\n{checked_text(row['input'], f'the input of {place}').strip()}"
        passes.setdefault(one, {})[question, seen[one, question]] = answer
        seen[one, question] += 1
    if found := next(((answers, one[1]) for one, answers in passes.items() if one[0] == seed), None):
        return found
    seeds = ", ".join(dict.fromkeys("none (greedy)" if one[0] is None else str(one[0]) for one in passes)) or "missing"
    wanted = "greedy answers" if seed is None else f"answers sampled with seed {seed}"
    raise UserError(f"{path} has no {wanted}: choose another seed with --answers-seed (the file's seeds are {seeds})")
