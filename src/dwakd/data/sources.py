"""Load and check the rows of a data set from the Hugging Face Hub, a local file or memory.

For data sets with several splits, on the Hub or in a dict, the split depends on the purpose: see `TRAIN_SPLITS`,
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
"""Names of the split for training. The first that exists is read."""
EVAL_SPLITS = (*_VALIDATION, "test")
"""Names of the split for evaluation during training. The first that exists is read."""
TEST_SPLITS = ("test", *_VALIDATION)
"""Names of the split for evaluation after training. The first that exists is read."""
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
        limit: maximum number of rows to read.
        need_response: False if rows without a response are allowed (evaluation).
        invalid_rows: `error` refuses a malformed row (no response, a value of a wrong type, a conversation without an
            answer, a repeated key); `skip` ignores such rows with a warning.
        name: name of the source in messages. Default: the path or id.

    Returns:
        The examples in the order of the source. Their `index` is the position of the row in the source.

    Raises:
        UserError: the source cannot be found or read or is empty, the split or a column is missing, or a row is
            malformed. The message names the file and line.

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
        raise UserError(f"{name} is empty: use a data set with at least one row")
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
        raise UserError(f"{name}: none of its {len(placed)} rows can be used; first error: {errors[0]}")
    if errors:
        logger.warning(
            "%s: skipping %d of %d rows, which are malformed; first error: %s",
            *(name, len(errors), len(placed), errors[0]),
        )
    return examples


def check_invalid_rows(invalid_rows: str) -> None:
    """Check the value of the option `data.invalid_rows`.

    Raises:
        UserError: the value is not one of `INVALID_ROWS`.
    """
    if invalid_rows not in INVALID_ROWS:
        raise UserError(f"data.invalid_rows {invalid_rows!r} is unknown: use {' or '.join(INVALID_ROWS)}")


def _read_row(row: Any, columns: Columns, index: int, where: str, need_response: bool) -> Example:
    if not isinstance(row, Mapping):
        raise _unreadable(where, row)
    try:
        for column in columns.used:
            if (reason := find_unusable(row.get(column))) is not None:
                raise UserError(f"{where}: {column!r} contains {reason}: correct or remove that row")
        return read_example(row, columns, index=index, where=where, need_response=need_response)
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: a value is nested too deeply or a number is too long: correct or remove that row"
        ) from error


def _unreadable(where: str, row: Any) -> UserError:
    """Return the error for a row without named columns."""
    if isinstance(row, Unusable):
        return UserError(f"{where}: this row is {row.reason}: correct or remove that row")
    if isinstance(row, Mapping):
        return UserError(f"{where}: this row has no columns: correct or remove that row")
    rows_in_one = isinstance(row, list) and bool(row) and isinstance(row[0], Mapping)
    fix = "use the suffix .json if the file is one list" if rows_in_one else "correct or remove that row"
    try:
        shown = f" {row!r:.40}"
    except (RecursionError, ValueError):
        shown = ""
    return UserError(f"{where}: expected an object with named columns, got {type(row).__name__}{shown}: {fix}")


def _open(source: Any, split: str | Sequence[str], name: str, select: Select) -> Iterator[PlacedRow]:
    """Read the rows of a source with their places. Only the columns that `select` returns are read where possible."""
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
        f"cannot read rows from {type(source).__name__}: use a Hub id, a file, a datasets.Dataset or a list of dicts"
    )


def _choose_split(splits: Mapping[Any, Any], split: str | Sequence[str], name: str, fix: str) -> str:
    wanted = [split] if isinstance(split, str) else split
    found = next((each for each in wanted if each in splits), None)
    if found is None:
        names = ", ".join(map(str, splits)) or "none"
        raise UserError(f"{name} has no split {' or '.join(map(repr, wanted))}: its splits are {names}; {fix}")
    if found != wanted[0]:
        logger.warning("%s has no split %r; using its split %r instead", name, wanted[0], found)
    return found


def _read_data_set(rows: datasets.Dataset | datasets.IterableDataset, name: str, select: Select) -> Iterator[PlacedRow]:
    rows = rows.with_format(None)
    if rows.column_names:
        rows = rows.select_columns(select(rows.column_names))  # others may be slow or impossible to decode
    yield from numbered(rows, name)


def _is_local(source: str | Path) -> bool:
    """Return whether a source is a path: it has the form of one or exists. Other strings are Hub ids."""
    looks = isinstance(source, Path) or source.startswith((".", "~")) or "\\" in source or source.count("/") > 1
    path = Path(source)
    try:
        return looks or path.is_absolute() or path.suffix.lower() in (*SUFFIXES, *_FOREIGN_SUFFIXES) or path.exists()
    except OSError:  # a name that is too long, a folder without permission
        return True


def _read_hub_file(
    repo: str, file: str, start: str | None, stop: str | None, name: str, select: Select
) -> Iterator[PlacedRow]:
    """Read a file of the Hub like a local file, because `datasets` cannot read columns that mix strings and lists."""
    try:
        path = huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")
    except Exception as error:  # the Hub and the network raise a dozen unrelated types
        raise UserError(
            f"could not load the file {file} of the data set {repo} from the Hugging Face Hub: {_first_line(error)}"
        ) from error
    return read_file(Path(path), name, select, start, stop)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_from_hub(source: str, split: str | Sequence[str]) -> Any:
    """Load a split of a data set from the Hub; of several names, load the first that exists."""
    place, _, own_split = source.partition("@")
    path, _, config = place.partition(":")
    only = own_split or (split if isinstance(split, str) else None)
    try:
        loaded = datasets.load_dataset(path, config or None, split=only)
    except Exception as error:  # the Hub, the network and the builders raise a dozen unrelated types
        raise UserError(
            f"could not load the data set {source!r} (split {only or split[0]!r}) from the Hugging Face Hub, and no "
            f"such file exists: {_first_line(error)}"
        ) from error
    if isinstance(loaded, Mapping):
        return loaded[_choose_split(loaded, split, source, f"add one, as in {place}@{next(iter(loaded))}")]
    return loaded
