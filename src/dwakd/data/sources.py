"""Rows of any data set, validated: a hub id, a local json, jsonl, csv or parquet file, or rows at hand.

Data sets with several splits, on the hub or in a dict, are read by the split that their use asks for: see `TRAIN_SPLITS`,
`EVAL_SPLITS` and `TEST_SPLITS`.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from dwakd.data.files import SUFFIXES, PlacedRow, Select, Unusable, find_unusable, guarded, numbered, read_file
from dwakd.data.rows import Columns, Example, read_example, resolve_columns
from dwakd.errors import UserError

__all__ = ["EVAL_SPLITS", "INVALID_ROWS", "SUFFIXES", "TEST_SPLITS", "TRAIN_SPLITS", "Example", "load_examples"]

logger = logging.getLogger(__name__)

INVALID_ROWS = ("error", "skip")
_VALIDATION = ("validation", "valid", "val", "dev", "eval")
TRAIN_SPLITS = ("train",)
"""Names of the split to train on; the first that exists is read."""
EVAL_SPLITS = (*_VALIDATION, "test")
"""Names of the split to evaluate on during training."""
TEST_SPLITS = ("test", *_VALIDATION)
"""Names of the split to evaluate a finished model on."""
_FOREIGN_SUFFIXES = (
    ".txt",
    ".tsv",
    ".xml",
    ".yaml",
    ".yml",
    ".arrow",
    ".gz",
    ".zip",
    ".zst",
    ".xlsx",
    ".ndjson",
    ".pkl",
)
_SUFFIX, _ROWS = r"\.(?:json|jsonl|csv|parquet)", r"@(?:train)?\[(?P<start>\d{0,18}):(?P<stop>\d{0,18})\]"
_HUB_FILE = re.compile(rf"(?P<repo>[\w-][\w.-]*/[\w.-]+):(?P<file>[^@:]+{_SUFFIX})(?:{_ROWS})?")
_LOCAL_ROWS = re.compile(rf"(?P<file>.+{_SUFFIX}){_ROWS}", re.IGNORECASE)


def load_examples(
    source: Any,
    *,
    split: str | Sequence[str] = "train",
    prompt: str | None = None,
    response: str | None = None,
    input: str | None = None,
    limit: int | None = None,
    need_response: bool = True,
    invalid_rows: str = "error",
    name: str | None = None,
) -> list[Example]:
    """Read and check the rows of a data set.

    Args:
        source: a hub id ("org/name", "org/name:config", either with a split of its own as "org/name@train[:90%]"), a
            file of a hub repository ("org/name:folder/file.jsonl", with rows as in "org/name:file.jsonl@[1000:]"), the
            path of a .json (a list of objects), .jsonl, .csv or .parquet file (with rows likewise), a `datasets.Dataset`
            or `IterableDataset`, a sequence of dicts, or a dict of any of these by split.
        split: of a hub data set without one of its own (in the syntax of `datasets`) or of a dict of data sets; of
            several names, the first that exists is read.
        prompt: column of the prompt, the instruction or the conversation; by default found, see `dwakd.data.rows`.
        response: column of the response: a string, or a list of reference strings of which the first is learnt.
        input: column of the further context.
        limit: read this many rows at most.
        need_response: False for questions without answers (evaluation).
        invalid_rows: `error` refuses a malformed row (no response, a value of another type, a conversation without an
            answer, a key given twice); `skip` leaves such rows out with a warning.
        name: what to call the source in messages; by default the path or id.

    Returns:
        The examples in the order of the source; `index` is a row's position in it.

    Raises:
        UserError: the source cannot be read or found or is empty, the split or a column is missing, or a row is
            malformed; the message names the file and line.

    Examples:
        >>> load_examples([{"prompt": "2 + 2 =", "response": "4"}])[0].response
        '4'
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, got {limit}")
    check_invalid_rows(invalid_rows)
    name = name or (str(source) if isinstance(source, str | Path) else "the data set passed in")
    options: dict[str, Any] = {"prompt": prompt, "response": response, "input": input, "need_response": need_response}

    def select(names: Sequence[str]) -> list[str]:
        return list(resolve_columns(names, name, **options).used)

    placed = list(islice(_open(source, split, name, select), limit))
    if not placed:
        raise UserError(f"{name} is empty: it has no rows to read")
    available = dict.fromkeys(str(key) for _, row in placed if isinstance(row, Mapping) for key in row)
    if not available:
        raise _unreadable(*placed[0])
    columns = resolve_columns(available, name, **options)
    examples: list[Example] = []
    errors: list[UserError] = []
    for index, (where, row) in enumerate(placed):
        try:
            examples.append(_read_row(row, columns, index, where, need_response))
        except UserError as error:
            if invalid_rows == "error":
                raise
            errors.append(error)
    if not examples:
        raise UserError(f"{name}: none of its {len(placed)} rows can be used; the first reason: {errors[0]}")
    if errors:
        logger.warning(
            "%s: %d of %d rows left out as malformed; the first: %s", name, len(errors), len(placed), errors[0]
        )
    return examples


def check_invalid_rows(invalid_rows: str) -> None:
    """Refuse what the option does not allow.

    Raises:
        UserError: as said.
    """
    if invalid_rows not in INVALID_ROWS:
        raise UserError(f"data.invalid_rows {invalid_rows!r} is unknown: use {' or '.join(INVALID_ROWS)}")


def _read_row(row: Any, columns: Columns, index: int, where: str, need_response: bool) -> Example:
    if not isinstance(row, Mapping):
        raise _unreadable(where, row)
    try:
        for column in columns.used:
            if (reason := find_unusable(row.get(column))) is not None:
                raise UserError(f"{where}: {column!r} holds {reason}: correct or remove that row")
        return read_example(row, columns, index=index, where=where, need_response=need_response)
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: a value is nested too deeply or a number too long: correct or remove it") from error


def _unreadable(where: str, row: Any) -> UserError:
    """What to say of a row without named columns."""
    if isinstance(row, Unusable):
        return UserError(f"{where}: this row is {row.reason}: correct or remove that row")
    if isinstance(row, Mapping):
        return UserError(f"{where}: this row has no columns: correct or remove that row")
    rows_in_one = isinstance(row, list) and bool(row) and isinstance(row[0], Mapping)
    fix = "name the file .json if it is one list" if rows_in_one else "correct or remove that row"
    try:
        shown = f" {row!r:.40}"
    except (RecursionError, ValueError):
        shown = ""
    return UserError(f"{where}: expected an object with named columns, got {type(row).__name__}{shown}: {fix}")


def _open(source: Any, split: str | Sequence[str], name: str, select: Select) -> Iterator[PlacedRow]:
    """The rows of a source and their places; columns that `select` does not choose are left unread where possible."""
    if isinstance(source, str) and (found := _HUB_FILE.fullmatch(source)):
        return _read_hub_file(**found.groupdict(), name=name, select=select)
    if isinstance(source, str) and (found := _LOCAL_ROWS.fullmatch(source)):
        return read_file(Path(found["file"]), name, select, found["start"], found["stop"])
    if isinstance(source, str | Path) and _is_local(source):
        return read_file(Path(source), name, select)
    if isinstance(source, str):
        source = _load_from_hub(source, split)
    if isinstance(source, Mapping):
        return _open(source[_choose_split(source, split, name, "pass one of them")], split, name, select)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return guarded(_read_data_set(source, name, select), f"{name}: cannot be read")
    if isinstance(source, Sequence):
        return numbered(source, name)
    raise UserError(
        f"cannot read rows from {type(source).__name__}: give a hub id, a file, a datasets.Dataset or a list of dicts"
    )


def _choose_split(splits: Mapping[Any, Any], split: str | Sequence[str], name: str, fix: str) -> str:
    wanted = [split] if isinstance(split, str) else split
    found = next((each for each in wanted if each in splits), None)
    if found is None:
        names = ", ".join(map(str, splits)) or "none"
        raise UserError(f"{name} has no split {' or '.join(map(repr, wanted))}: its splits are {names}; {fix}")
    if found != wanted[0]:
        logger.warning("%s has no split %r; its split %r is read instead", name, wanted[0], found)
    return found


def _read_data_set(rows: datasets.Dataset | datasets.IterableDataset, name: str, select: Select) -> Iterator[PlacedRow]:
    rows = rows.with_format(None)
    if rows.column_names:
        rows = rows.select_columns(select(rows.column_names))  # others may be slow or impossible to decode
    yield from numbered(rows, name)


def _is_local(source: str | Path) -> bool:
    """A path, by its looks or because it is there; everything else is a hub id."""
    looks = isinstance(source, Path) or source.startswith((".", "~")) or "\\" in source or source.count("/") > 1
    path = Path(source)
    try:
        return looks or path.is_absolute() or path.suffix.lower() in (*SUFFIXES, *_FOREIGN_SUFFIXES) or path.exists()
    except OSError:  # a name that is too long, a folder without permission
        return True


def _read_hub_file(
    repo: str, file: str, start: str | None, stop: str | None, name: str, select: Select
) -> Iterator[PlacedRow]:
    """Read as a local file is: data sets that mix strings and lists of references have no schema for `datasets`."""
    try:
        path = huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")
    except Exception as error:  # the hub and the network raise a dozen unrelated types
        raise UserError(
            f"cannot load the file {file} of the data set {repo} from the hub: {_first_line(error)}"
        ) from error
    return read_file(Path(path), name, select, start, stop)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_from_hub(source: str, split: str | Sequence[str]) -> Any:
    """The split that is named; of several names, the first that exists."""
    place, _, own_split = source.partition("@")
    path, _, config = place.partition(":")
    only = own_split or (split if isinstance(split, str) else None)
    try:
        loaded = datasets.load_dataset(path, config or None, split=only)
    except Exception as error:  # the hub, the network and the builders raise a dozen unrelated types
        raise UserError(
            f"cannot load the data set {source!r} (split {only or split[0]!r}) from the hub, and no such file exists: "
            f"{_first_line(error)}"
        ) from error
    if isinstance(loaded, Mapping):
        return loaded[_choose_split(loaded, split, source, f"name one, as in {place}@{next(iter(loaded))}")]
    return loaded
