"""Read and check test sets, and give them names, before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dwakd.data.sources import SUFFIXES, TEST_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.options import RowOptions
from dwakd.evaluation.rouge import has_reference


@dataclass(frozen=True)
class EvaluationSet:
    """A test set.

    Args:
        name: short, unique among the sets evaluated together, and valid as a file name.
        source: the name that the user gave.
        examples: the rows; either all of them have references or a response, or none has (see `scored`).
    """

    name: str
    source: str
    examples: list[Example]

    @property
    def scored(self) -> bool:
        """Whether there are references or responses that answers can be compared with."""
        return has_reference(self.examples[0])


def read_test_sets(data: Sequence[str], rows: RowOptions) -> list[EvaluationSet]:
    """Read and check test sets; needs no model.

    Args:
        data: files or hub ids; may be empty.
        rows: columns to read, and how many rows of each set.

    Returns:
        The sets in the given order. A set without a response or references in any row is answered without scores.

    Raises:
        UserError: a set is named twice, cannot be read, or has references in some rows only.
    """
    sets: list[EvaluationSet] = []
    for source in data:
        if any(other.source == source for other in sets):
            raise UserError(f"the test set {source} is named twice: name it once")
        examples = load_examples(source, split=TEST_SPLITS, need_response=False, **rows.reading())
        _check_references(examples, source)
        sets.append(EvaluationSet(_free_name(source, [other.name for other in sets]), source, examples))
    return sets


def _check_references(examples: Sequence[Example], source: str) -> None:
    lacking = [example.index for example in examples if not has_reference(example)]
    if 0 < len(lacking) < len(examples):
        raise UserError(
            f"{source}: {len(lacking)} of {len(examples)} rows have no response and no references, the first is row "
            f"{lacking[0]} (counting from 0): add references to these rows or remove them"
        )


def _free_name(source: str, taken: Sequence[str]) -> str:
    """Name a set by its folder and file: p3/test.jsonl becomes p3-test, or p3-test-2 if that name is taken."""
    path = Path(source)
    last = path.stem if path.suffix.lower() in SUFFIXES else path.name
    parts = [part for part in (*path.parts[-2:-1], last) if part not in ("/", ".", "..", "~")]
    name = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-") or "test"
    used, candidate, number = {other.casefold() for other in taken}, name, 2
    while candidate.casefold() in used:  # some file systems ignore the case of letters
        candidate, number = f"{name}-{number}", number + 1
    return candidate
