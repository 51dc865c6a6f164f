"""Read the rows of a local .json, .jsonl, .csv or .parquet file."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import datasets
import pyarrow  # type: ignore[import-untyped, unused-ignore]
from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

from dwakd.errors import UserError

PlacedRow: TypeAlias = tuple[str, Any]
"""The place of a row, as messages name it, and the row itself."""
Select: TypeAlias = Callable[[Sequence[str]], list[str]]
"""Selects the columns to read from the names of all columns."""


@dataclass(frozen=True)
class Unusable:
    """Replaces a JSON value that cannot be represented. It is an error only in a column that is used."""

    reason: str


def read_file(path: Path, name: str, select: Select) -> Iterator[PlacedRow]:
    """Read the rows of a file one by one; `name` is its name in messages. `select` is used for parquet files only.

    Errors of the file system and of pyarrow are not converted here: use `dwakd.errors.explained`.
    """
    with path.expanduser().open("rb") as file:
        if path.suffix.lower() not in _READERS:
            found = path.suffix or "a file without suffix"
            raise UserError(f"{name}: cannot read {found}: use {', '.join(SUFFIXES)}")
        yield from _READERS[path.suffix.lower()](file, name, select)


def numbered(rows: Iterable[Any], name: str) -> Iterator[PlacedRow]:
    """Add to each row its place: the source's name and the number of the row."""
    return ((f"{name}, row {index} (counting from 0)", row) for index, row in enumerate(rows))


def parse_json(text: str) -> Any:
    """Parse a JSON text. Objects with a repeated key and integers with too many digits become `Unusable`."""
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unusable:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    return Unusable(f"an object with more than one key {_repeated(key for key, _ in pairs)}")


def _integer(digits: str) -> int | Unusable:
    try:
        return int(digits)
    except ValueError:  # Python refuses to convert more than 4,300 digits
        return Unusable(f"a number of {len(digits):,} digits")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _repeated(names: Iterable[str]) -> str:
    """List the names that occur more than once."""
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


def _refuse_repeated(names: Iterable[str], where: str) -> None:
    if shown := _repeated(names):
        raise UserError(f"{where}: more than one column has the name {shown}: rename or remove all but one")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _parse(data: bytes, name: str, line: int, fix: str) -> Any:
    """Parse the JSON text that begins at a line of a file."""
    try:
        return parse_json(_decode(data, f"{name}, line {line}"))
    except (json.JSONDecodeError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{name}, line {line}: not valid JSON ({reason}): {fix}") from error


def stream_jsonl(path: Path, name: str) -> Iterator[PlacedRow]:
    """Read the rows of a .jsonl file. The error takes the place of a line that cannot be parsed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = _parse(line.rstrip(), name, number, "correct or remove that line") if line.strip() else None
            except UserError as error:
                row = error
            if line.strip():
                yield f"{name}, line {number}", row


def _read_jsonl(file: BinaryIO, name: str, _: Select) -> Iterator[PlacedRow]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{name}, line {number}", _parse(line.rstrip(), name, number, "correct or remove that line")


def _read_json(file: BinaryIO, name: str, _: Select) -> Iterator[PlacedRow]:
    rows = _parse(file.read(), name, 1, "correct it, or use the suffix .jsonl if it has one object per line")
    if not isinstance(rows, list):
        found = rows.reason if isinstance(rows, Unusable) else type(rows).__name__
        raise UserError(f"{name}: the file must contain a list of objects, got {found}: put the objects into a list")
    yield from numbered(rows, name)


def _read_csv(file: BinaryIO, name: str, _: Select) -> Iterator[PlacedRow]:
    csv.field_size_limit(2**31 - 1)  # Python's default limit is 128 KiB per field
    reader = csv.DictReader(io.StringIO(_decode(file.read(), name), newline=""), strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or []]
        _refuse_repeated(filter(None, header), f"{name}, line {reader.line_num}")  # nameless columns are never read
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: the number of fields differs from the header's: correct that line")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.reader.line_num}: not valid CSV ({error}): correct that line") from error


def _read_parquet(file: BinaryIO, name: str, select: Select) -> Iterator[PlacedRow]:
    """Read with pyarrow, because `datasets` refuses types and metadata that it does not know, even in unused columns."""
    table = parquet.ParquetFile(file)
    schema = table.schema_arrow
    _refuse_repeated(schema.names, name)
    columns = select(schema.names)
    rows: Iterator[Any] = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
    if any("arrow.json" in str(schema.field(column).type) for column in columns):
        features = datasets.Features.from_arrow_schema(pyarrow.schema(map(schema.field, columns)))
        rows = map(features.decode_example, rows)
    yield from numbered(rows, name)


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
SUFFIXES = tuple(_READERS)
