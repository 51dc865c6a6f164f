"""Rows of any data set, validated: a hub id, a local json, jsonl, csv or parquet file, or rows at hand."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow  # type: ignore[import-untyped, unused-ignore]
from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

from dwakd.data.rows import Example, read_example, resolve_columns
from dwakd.errors import UserError

__all__ = ["Example", "load_examples"]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
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
_SUFFIX, _ROWS = r"\.(?:json|jsonl|csv|parquet)", r"@(?:train)?\[(?P<start>\d*):(?P<stop>\d*)\]"
_HUB_FILE = re.compile(rf"(?P<repo>[\w-][\w.-]*/[\w.-]+):(?P<file>[^@:]+{_SUFFIX})(?:{_ROWS})?")
_LOCAL_ROWS = re.compile(rf"(?P<file>.+{_SUFFIX}){_ROWS}", re.IGNORECASE)
_Placed = tuple[str, Any]  # where a row stands, and the row


def load_examples(
    source: Any,
    *,
    split: str = "train",
    prompt: str | None = None,
    response: str | None = None,
    input: str | None = None,
    limit: int | None = None,
    need_response: bool = True,
    name: str | None = None,
) -> list[Example]:
    """Read and check the rows of a data set.

    Args:
        source: a hub id ("org/name", "org/name:config", either with a split of its own as "org/name@train[:90%]"), a
            file of a hub repository ("org/name:folder/file.jsonl", with rows as in "org/name:file.jsonl@[1000:]"), the
            path of a .json (a list of objects), .jsonl, .csv or .parquet file (with rows likewise), a `datasets.Dataset`
            (or a dict of them by split), or a sequence of dicts.
        split: of a hub data set without one of its own (in the syntax of `datasets`) or of a dict of data sets.
        prompt: column of the prompt, the instruction or the conversation; by default found, see `dwakd.data.rows`.
        response: column of the response: a string, or a list of reference strings of which the first is learnt.
        input: column of the further context.
        limit: read this many rows at most.
        need_response: False for questions without answers (evaluation).
        name: what to call the source in messages; by default the path or id.

    Returns:
        The examples in the order of the source.

    Raises:
        UserError: the source cannot be read or found or is empty, a column is missing, or a row is malformed; the
            message names the file and line.

    Examples:
        >>> load_examples([{"prompt": "2 + 2 =", "response": "4"}])[0].response
        '4'
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, got {limit}")
    name = name or (str(source) if isinstance(source, str | Path) else "the data set passed in")
    options: dict[str, Any] = {"prompt": prompt, "response": response, "input": input}
    rows = _open(source, split, name)
    if isinstance(rows, datasets.Dataset):
        if len(rows):
            columns = resolve_columns(rows.column_names, name, **options, need_response=need_response)
            rows = rows.with_format(None).select_columns(list(columns.used))  # others may be slow to decode
        rows = _number(rows, name)
    placed = list(islice(rows, limit))
    if not placed:
        raise UserError(f"{name} is empty: it has no rows to read")
    for where, row in placed:
        if not isinstance(row, Mapping):
            rows_in_one = isinstance(row, list) and bool(row) and isinstance(row[0], Mapping)
            mend = "name the file .json if it is one list" if rows_in_one else "correct or remove that row"
            kind = type(row).__name__
            raise UserError(f"{where}: expected an object with named columns, got {kind} {row!r:.40}: {mend}")
    available = dict.fromkeys(key for _, row in placed for key in row)
    columns = resolve_columns(available, name, **options, need_response=need_response)
    return [
        read_example(row, columns, index=index, where=where, need_response=need_response)
        for index, (where, row) in enumerate(placed)
    ]


def _open(source: Any, split: str, name: str) -> Any:
    """A `datasets.Dataset`, or an iterator over rows and their places."""
    if isinstance(source, str | Path):
        if isinstance(source, str) and (found := _HUB_FILE.fullmatch(source)):
            return _read_hub_file(**found.groupdict(), name=name)
        if isinstance(source, str) and (found := _LOCAL_ROWS.fullmatch(source)):
            return _rows_of(Path(found["file"]).expanduser(), found["start"], found["stop"], name)
        if _is_local(source):
            return _read_file(Path(source).expanduser(), name)
        source = _load_from_hub(str(source), split)
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise UserError(f"{name} has no split {split!r}: its splits are {', '.join(source)}")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, Sequence):
        return _number(source, name)
    raise UserError(
        f"cannot read rows from {type(source).__name__}: give a hub id, a file, a datasets.Dataset or a list of dicts"
    )


def _number(rows: Any, name: str) -> Iterator[_Placed]:
    return ((f"{name}, row {index} (counting from 0)", row) for index, row in enumerate(rows))


def _is_local(source: str | Path) -> bool:
    """A path, by its looks or because it is there; everything else is a hub id."""
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists() or path.is_absolute():
        return True
    looks = source.startswith((".", "~")) or "\\" in source or source.count("/") > 1
    return looks or path.suffix.lower() in (*SUFFIXES, *_FOREIGN_SUFFIXES)


def _read_hub_file(repo: str, file: str, start: str | None, stop: str | None, name: str) -> Any:
    """Read as a local file is: data sets that mix strings and lists of references have no schema for `datasets`."""
    try:
        path = huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")
    except Exception as error:  # the hub and the network raise a dozen unrelated types
        raise UserError(
            f"cannot load the file {file} of the data set {repo} from the hub: {_first_line(error)}"
        ) from error
    return _rows_of(Path(path), start, stop, name)


def _rows_of(path: Path, start: str | None, stop: str | None, name: str) -> Iterator[_Placed]:
    rows = _read_file(path, name)
    rows = _number(rows, name) if isinstance(rows, datasets.Dataset) else rows
    return islice(rows, int(start or 0), int(stop) if stop else None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_from_hub(source: str, split: str) -> Any:
    place, _, own_split = source.partition("@")
    path, _, config = place.partition(":")
    split = own_split or split
    try:
        return datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the hub, the network and the builders raise a dozen unrelated types
        raise UserError(
            f"cannot load the data set {source!r} (split {split!r}) from the hub, and no such file exists: "
            f"{_first_line(error)}"
        ) from error


def _read_file(path: Path, name: str) -> Any:
    if not path.exists():
        raise UserError(f"{name}: no such file")
    if path.is_dir():
        raise UserError(f"{name} is a folder: name a file in it ({', '.join(SUFFIXES)})")
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}: cannot read {path.suffix or 'a file without suffix'}: use {', '.join(SUFFIXES)}")
    return reader(path, name)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _read_jsonl(path: Path, name: str) -> Iterator[_Placed]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{name}, line {number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                yield where, json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{where}: not valid JSON ({reason}): correct or remove that line") from error


def _read_json(path: Path, name: str) -> Iterator[_Placed]:
    try:
        rows = json.loads(_decode(path.read_bytes(), name))
    except json.JSONDecodeError as error:
        mend = "name the file .jsonl if it holds one object a line" if error.msg == "Extra data" else "correct it"
        raise UserError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}): {mend}") from error
    if not isinstance(rows, list):
        raise UserError(f"{name}: expected a list of objects, got {type(rows).__name__}")
    return _number(rows, name)


def _read_csv(path: Path, name: str) -> Iterator[_Placed]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a field above 128 KiB
    text = _decode(path.read_bytes(), name)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: has not as many fields as the header ({len(reader.fieldnames or [])}): correct it"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.reader.line_num}: not valid CSV ({error}): correct that line") from error


def _read_parquet(path: Path, name: str) -> Any:
    try:
        return datasets.Dataset(parquet.read_table(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not a readable parquet file ({type(error).__name__})") from error
