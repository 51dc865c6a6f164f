"""Load and check the rows of a data set from the Hugging Face Hub, a local file or memory."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from dwakd.data.files import SUFFIXES, PlacedRow, Select, numbered, read_file
from dwakd.data.rows import INVALID_ROWS, SUPERVISE, Columns, Example, check_choice, check_row
from dwakd.errors import UserError, explained

__all__ = ["EVAL_SPLITS", "SUFFIXES", "TEST_SPLITS", "TRAIN_SPLITS", "Example", "load_examples"]

logger = logging.getLogger(__name__)

_VALIDATION = ("validation", "valid", "val", "dev", "eval")
# Names of the split for training, for evaluation during training and after it. The first that exists is read.
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = (*_VALIDATION, "test")
TEST_SPLITS = ("test", *_VALIDATION)
_FILE = re.compile(
    r"(?:(?P<repo>[\w-][\w.-]*/[\w.-]+):)?(?P<file>.+\.(?:json|jsonl|csv|parquet))"
    r"(?:@(?:train)?\[(?P<start>\d{0,18}):(?P<stop>\d{0,18})\])?",
    re.IGNORECASE | re.DOTALL,
)


def load_examples(
    source: Any,
    *,
    split: str | Sequence[str] = "train",
    prompt: str | None = None,
    response: str | None = None,
    input: str | None = None,
    teacher_prompt: str | None = None,
    teacher_key: str | None = None,
    supervise: str = "last",
    limit: int | None = None,
    need_response: bool = True,
    invalid_rows: str = "error",
    name: str | None = None,
) -> list[Example]:
    """Read and check the rows of a data set.

    Args:
        source: one of the following.

            - A Hub id: "org/name" or "org/name:config", optionally with a split, as in "org/name@train[:90%]".
            - A file in a data set repository of the Hub: "org/name:folder/file.jsonl", optionally with a range of rows,
              as in "org/name:file.jsonl@[1000:]".
            - The path of a .json (a list of objects), .jsonl, .csv or .parquet file, optionally with a range of rows.
            - A `datasets.Dataset` or `IterableDataset`, a sequence of dicts, or a dict from split names to data sets.
        split: the split to read if `source` names none, in the syntax of `datasets`, or a sequence of names, of which
            the first that exists is read.
        prompt: column of the prompt, the instruction or the conversation. Default: see `dwakd.data.rows`.
        response: column of the response, which is a string or a list of references, of which the first is trained on.
        input: column of the further context.
        teacher_prompt: column of a prompt, a text or a conversation, that teachers read instead of the row's prompt,
            input and system text. Rows in which it is empty have one prompt for all.
        teacher_key: column with the name of the only teacher of each row.
        supervise: `last` trains on the last assistant turn of a conversation; `all` makes an example of each one.
        limit: maximum number of rows to read.
        need_response: False if rows without a response are allowed (evaluation).
        invalid_rows: `error` refuses a malformed row (no response, a value of a wrong type, a conversation without an
            answer, a repeated key); `skip` ignores such rows with a warning.
        name: name of the source in messages. Default: the path or id.

    Raises:
        UserError: the source cannot be found or read or is empty, the split or a column is missing, or a row is
            malformed. The message names the file and line.

    Examples:
        >>> load_examples([{"prompt": "2 + 2 =", "response": "4"}])[0].response
        '4'
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, got {limit}")
    check_choice("data.invalid_rows", invalid_rows, INVALID_ROWS)
    check_choice("data.supervise", supervise, SUPERVISE)
    name = name or (str(source) if isinstance(source, str | Path) else "the data set passed in")
    given = {"prompt": prompt, "response": response, "input": input, "teacher_prompt": teacher_prompt}
    given["teacher_key"] = teacher_key

    find_columns = partial(Columns.find, source=name, given=given, need_response=need_response, supervise=supervise)
    with explained(f"{name:.500}: cannot be read"):
        placed = list(islice(_open(source, split, name, lambda names: find_columns(names).used), limit))
    if not placed:
        raise UserError(f"{name} is empty: use a data set with at least one row")
    available = dict.fromkeys(str(key) for _, row in placed if isinstance(row, Mapping) for key in row)
    columns = find_columns(available) if available else None
    examples: list[Example] = []
    errors: list[str] = []
    for index, (where, row) in enumerate(placed):
        try:
            check_row(row)
            if columns is not None:
                examples += columns.read(row, index)
        except UserError as error:
            errors.append(f"{where}: {error}: correct or remove that row")
            if invalid_rows == "error":
                raise UserError(errors[0]) from error
    if not examples:
        raise UserError(f"{name}: none of its {len(placed)} rows can be used; first error: {errors[0]}")
    if errors:
        logger.warning(
            "%s: skipping %d of %d rows, which are malformed; first error: %s",
            *(name, len(errors), len(placed), errors[0]),
        )
    if supervise == "all":
        examples = [replace(example, index=number) for number, example in enumerate(examples)]
    return examples


def _open(source: Any, split: str | Sequence[str], name: str, select: Select) -> Iterator[PlacedRow]:
    """Read the rows of a source with their places. Only the columns that `select` returns are read where possible."""
    if isinstance(source, str) and (found := _FILE.fullmatch(source)):
        repo, path = found["repo"], found["file"]
        if repo:  # not by `datasets`, which cannot read columns that mix strings and lists
            with explained(f"could not load the file {path} of the data set {repo} from the Hugging Face Hub"):
                path = huggingface_hub.hf_hub_download(repo, path, repo_type="dataset")
        stop = int(found["stop"]) if found["stop"] else None
        return islice(read_file(Path(path), name, select), int(found["start"] or 0), stop)
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        return read_file(Path(source), name, select)
    if isinstance(source, str):
        place, _, own_split = source.partition("@")
        path, _, config = place.partition(":")
        split = own_split or split
        only = split if isinstance(split, str) else None  # otherwise all, to choose one
        what = f"{place[:500]!r} (split {only or split[0]!r})"
        with explained(f"could not load {what} from the Hugging Face Hub, and no such file exists"):
            source = datasets.load_dataset(path, config or None, split=only)
    if isinstance(source, Mapping):
        return _open(source[_choose_split(source, split, name)], split, name, select)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        source = source.with_format(None)
        if source.column_names:  # columns that are not read may be slow or impossible to decode
            source = source.select_columns(select(source.column_names))
    elif not isinstance(source, Sequence):
        kind = type(source).__name__
        raise UserError(f"cannot read rows from {kind}: use a Hub id, a file, a datasets.Dataset or a list of dicts")
    return numbered(source, name)


def _choose_split(splits: Mapping[Any, Any], split: str | Sequence[str], name: str) -> str:
    wanted = [split] if isinstance(split, str) else split
    found = next((each for each in wanted if each in splits), None)
    if found is None:
        found = (
            f"its splits are {', '.join(map(str, splits)) or 'none'}; pass one of them (org/name@train for a Hub id)"
        )
        raise UserError(f"{name} has no split {' or '.join(map(repr, wanted))}: {found}")
    if found != wanted[0]:
        logger.warning("%s has no split %r; using its split %r instead", name, wanted[0], found)
    return found


def _is_path(source: str) -> bool:
    """Return whether a string has the form of a path or exists. Other strings are Hub ids."""
    looks = source.startswith((".", "~")) or "\\" in source or source.count("/") > 1
    return looks or Path(source).is_absolute() or os.path.exists(source)  # noqa: PTH110, Path.exists refuses names that are too long
