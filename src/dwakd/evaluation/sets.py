"""Test sets: read, checked and named before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwakd.data.sources import SUFFIXES, TEST_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.rouge import has_reference


@dataclass(frozen=True)
class EvaluationSet:
    """A test set.

    Args:
        name: short, unique among the sets evaluated together, and fit for a file name.
        source: as the user named it.
        examples: its rows; all have references or a response, or none has (see `scored`).
    """

    name: str
    source: str
    examples: list[Example]

    @property
    def scored(self) -> bool:
        """Whether answers can be compared with anything."""
        return has_reference(self.examples[0])


def check_evaluation(
    data: Sequence[str],
    *,
    columns: Mapping[str, str | None] | None = None,
    limit: int | None = None,
    num_seeds: int = 5,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    prefix: str = "",
) -> list[EvaluationSet]:
    """Read and check test sets and the options of their evaluation; needs no model.

    Args:
        data: files or hub ids; may be empty.
        columns: names of the columns "prompt", "response" and "input", where they are not found by themselves.
        limit: rows of each set at most.
        num_seeds, max_new_tokens, batch_size: checked to be at least 1.
        prefix: put before the names of options in messages, as "evaluation.".

    Returns:
        The sets in the order given. A set without a response or reference in any row is one to answer only.

    Raises:
        UserError: an option below 1, a set named twice, one that cannot be read, or one with references in some rows
            only.
    """
    limits = {"seeds": num_seeds, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "limit": limit}
    for option, value in limits.items():
        if value is not None and value < 1:
            raise UserError(f"{prefix}{option} must be at least 1, got {value}.")
    sets: list[EvaluationSet] = []
    options: dict[str, Any] = {"split": TEST_SPLITS, "limit": limit, "need_response": False, **(columns or {})}
    for source in data:
        if any(other.source == source for other in sets):
            raise UserError(f"the test set {source} is named twice; name it once.")
        examples = load_examples(source, **options)
        _check_references(examples, source)
        sets.append(EvaluationSet(_free_name(source, [other.name for other in sets]), source, examples))
    return sets


def _check_references(examples: Sequence[Example], source: str) -> None:
    lacking = [example.index for example in examples if not has_reference(example)]
    if 0 < len(lacking) < len(examples):
        raise UserError(
            f"{source}, row {lacking[0]} (counting from 0) has no response and no references, as {len(lacking)} of "
            f"{len(examples)} rows: add them, or remove these rows."
        )


def _free_name(source: str, taken: Sequence[str]) -> str:
    """p3/test.jsonl gives p3-test; the next of that name p3-test-2."""
    path = Path(source)
    last = path.stem if path.suffix.lower() in SUFFIXES else path.name
    parts = [part for part in (*path.parts[-2:-1], last) if part not in ("/", ".", "..", "~")]
    name = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-") or "test"
    used, candidate, number = {other.casefold() for other in taken}, name, 2
    while candidate.casefold() in used:  # some file systems don't tell upper from lower case
        candidate, number = f"{name}-{number}", number + 1
    return candidate
