"""Read the rows of a local .json, .jsonl, .csv or .parquet file and turn every parser's exception into a UserError."""

import csv
import io
import json
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow  # type: ignore[import-untyped, unused-ignore]
from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

from dwakd.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
MAX_DIGITS = 4300  # Python does not convert longer strings to integers

PlacedRow: TypeAlias = tuple[str, Any]
"""The place of a row, as messages name it, and the row itself."""
Select: TypeAlias = Callable[[Sequence[str]], list[str]]
"""Selects the columns to read from the names of all columns."""


@dataclass(frozen=True)
class Unusable:
    """Replaces a JSON value that cannot be represented. It is an error only in a column that is used.

    Args:
        reason: description of the value for the message, as in "a number of 5,000 digits".
    """

    reason: str


def read_file(
    path: Path, name: str, select: Select, start: str | None = None, stop: str | None = None
) -> Iterator[PlacedRow]:
    """Read the rows of a file one by one.

    Args:
        path: path of the file.
        name: name of the file in messages.
        select: selects the columns to read. Only parquet files make use of it; from other files all columns are read.
        start: index of the first row to read, as a string of digits.
        stop: index of the row to stop before, as a string of digits.

    Raises:
        UserError: the file does not exist, has an unsupported suffix, or cannot be parsed.
    """
    try:
        path = path.expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{name}: no such file; check the path") from error
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # no permission, a name that is too long or has a null character, an unknown ~user
        raise UserError(f"{name:.200}: cannot be read ({_reason_of(error)})") from error
    if is_folder:
        raise UserError(f"{name} is a folder: give the path of a file in it ({', '.join(SUFFIXES)})")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: cannot read {path.suffix or 'a file without suffix'}: use {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        rows = guarded(_read_parquet(path, name, select), f"{name}: not a readable parquet file")
    else:
        reader = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}[suffix]
        rows = guarded(reader(path, name), f"{name}: cannot be read")
    return islice(rows, int(start or 0), int(stop) if stop else None)


def numbered(rows: Iterable[Any], name: str) -> Iterator[PlacedRow]:
    """Add to each row its place: the source's name and the number of the row."""
    return ((f"{name}, row {index} (counting from 0)", row) for index, row in enumerate(rows))


def guarded(rows: Iterator[PlacedRow], what: str) -> Iterator[PlacedRow]:
    """Yield the rows; any exception raised while reading them becomes a UserError that begins with `what`."""
    try:
        yield from rows
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow, datasets and the file system raise a dozen unrelated types
        raise UserError(f"{what} ({_reason_of(error)})") from error


def _reason_of(error: Exception) -> str:
    """Return the type of an exception and the first sentence of its message."""
    text = str(getattr(error, "strerror", None) or error).strip()
    first = (text.splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first:.200}" if first else type(error).__name__


def _refuse_repeated(names: Iterable[str], where: str) -> None:
    """Refuse columns or fields that share a name, because all but one of them would be lost.

    Raises:
        UserError: a name occurs more than once.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        shown = ", ".join(map(repr, repeated))
        raise UserError(f"{where}: more than one column has the name {shown}: rename or remove all but one")


def _check_schema(schema: Any, used: Sequence[str], name: str) -> None:
    """Refuse columns that share a name, and fields that share a name inside a column to read.

    Raises:
        UserError: a name occurs more than once.
    """
    _refuse_repeated(schema.names, name)
    pending = [(column, schema.field(column).type) for column in used]
    for column, kind in pending:
        fields = [kind.field(index) for index in range(kind.num_fields)]
        _refuse_repeated((field.name for field in fields), f"{name}, column {column!r}")
        pending += [(column, field.type) for field in fields]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unusable:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return Unusable(f"an object with more than one key {', '.join(map(repr, repeated))}")


def _integer(digits: str) -> int | Unusable:
    return int(digits) if len(digits) <= MAX_DIGITS else Unusable(f"a number of {len(digits):,} digits")


parse_json = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer).decode
"""Parse a JSON text. Objects with a repeated key and integers with too many digits become `Unusable`."""


def find_unusable(value: Any) -> str | None:
    """Return the reason of the first `Unusable` inside a parsed value, or None if there is none."""
    if isinstance(value, Unusable):
        return value.reason
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((reason for part in parts if (reason := find_unusable(part)) is not None), None)


def _read_jsonl(path: Path, name: str) -> Iterator[PlacedRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{name}, line {number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                yield where, parse_json(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{where}: not valid JSON ({reason}): correct or remove that line") from error


def _read_json(path: Path, name: str) -> Iterator[PlacedRow]:
    try:
        rows = parse_json(_decode(path.read_bytes(), name))
    except json.JSONDecodeError as error:
        fix = "use the suffix .jsonl if it has one object per line" if error.msg == "Extra data" else "correct it"
        raise UserError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}): {fix}") from error
    except RecursionError as error:
        raise UserError(f"{name}: the file contains a value that is nested too deeply ({error}): remove it") from error
    if not isinstance(rows, list):
        found = rows.reason if isinstance(rows, Unusable) else type(rows).__name__
        raise UserError(f"{name}: the file must contain a list of objects, got {found}: put the objects into a list")
    yield from numbered(rows, name)


def _read_csv(path: Path, name: str) -> Iterator[PlacedRow]:
    csv.field_size_limit(2**31 - 1)  # Python's default limit is 128 KiB per field
    text = _decode(path.read_bytes(), name)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or []]
        _refuse_repeated(
            filter(None, header), f"{name}, line {reader.line_num}"
        )  # columns without a name are never read
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: the number of fields differs from the header's ({len(header)}): correct that line"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.reader.line_num}: not valid CSV ({error}): correct that line") from error


def _read_parquet(path: Path, name: str, select: Select) -> Iterator[PlacedRow]:
    """Read with pyarrow, because `datasets` refuses types and metadata that it does not know, even in unused columns."""
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        columns = select(schema.names)
        _check_schema(schema, columns, name)
        rows: Iterator[Any] = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        if any("arrow.json" in str(schema.field(column).type) for column in columns):
            features = datasets.Features.from_arrow_schema(pyarrow.schema(map(schema.field, columns)))
            rows = map(features.decode_example, rows)
        yield from numbered(rows, name)
