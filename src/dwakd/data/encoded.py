"""Encoded rows, in memory or in an Arrow file that is mapped into memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute  # type: ignore[import-untyped, unused-ignore]
import torch
from numpy.typing import NDArray

_BATCH = 1024
_TOKENS = pyarrow.list_(pyarrow.list_(pyarrow.int32()))  # a list for each side
_SCHEMA = pyarrow.schema(
    {
        "example_id": pyarrow.int64(),
        "text": pyarrow.string(),
        "place": pyarrow.string(),
        "truncated": pyarrow.bool_(),
        "chosen": pyarrow.int32(),
        "lengths": pyarrow.list_(pyarrow.int32()),
        "num_prompt": pyarrow.list_(pyarrow.int32()),
        "ids": _TOKENS,
        "byte_ends": _TOKENS,
        "aligned_rows": _TOKENS,
    }
)


@dataclass(frozen=True)
class EncodedSide:
    """A row encoded with one tokenizer."""

    ids: NDArray[np.int32]  # tokens of the prompt, of the response and, unless it was truncated, the end token
    num_prompt: int  # number of tokens of the prompt
    byte_ends: NDArray[np.int32]  # end of each token after the prompt; see `TextEncoder.response_ids`
    aligned_rows: NDArray[np.int32] | None = None  # set for a teacher if the method needs it; see `align_by_spelling`

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.ids) - 1

    def features(self) -> dict[str, list[Any]]:
        """Return the values of each position. Input position i predicts target i."""
        num_unsupervised = self.num_prompt - 1
        features = {
            "input_ids": self.ids[:-1].tolist(),
            "target_ids": self.ids[1:].tolist(),
            "response_mask": [False] * num_unsupervised + [True] * len(self.byte_ends),
            "byte_ends": [0] * num_unsupervised + self.byte_ends.tolist(),
        }
        return features if self.aligned_rows is None else {**features, "aligned_rows": self.aligned_rows.tolist()}


@dataclass(frozen=True)
class EncodedRow:
    """A row encoded for the student and for each teacher."""

    example_id: int
    text: str
    student: EncodedSide
    teachers: tuple[EncodedSide, ...] = ()
    truncated: bool = False
    place: str = ""  # the row in its source, for messages
    chosen: int | None = None  # index of the only teacher of the row, if it has only one

    @property
    def teacher(self) -> EncodedSide | None:
        """The side of the first teacher, if there is one."""
        return self.teachers[0] if self.teachers else None


class RowWriter:
    """Write encoded rows to an Arrow file, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_file(self._file, _SCHEMA)
        self._waiting: list[EncodedRow] = []

    def append(self, row: EncodedRow) -> None:
        """Add a row."""
        self._waiting.append(row)
        if len(self._waiting) == _BATCH:
            self._flush()

    def close(self) -> "StoredRows":
        """Write the rows that are left, and return all rows of the file."""
        self._flush()
        self._writer.close()
        self._file.close()
        return StoredRows.open(self.path)

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        sides = [(row.student, *row.teachers) for row in rows]
        columns: dict[str, Any] = {
            name: [getattr(row, name) for row in rows]
            for name in ("example_id", "text", "place", "truncated", "chosen")
        }
        for name, attribute in {"lengths": "length"}.items() | {(n, n) for n in _SCHEMA.names[6:]}:
            columns[name] = [[getattr(side, attribute) for side in own] for own in sides]
        self._writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, _SCHEMA))


class StoredRows(Sequence[EncodedRow]):
    """The rows of a table that `RowWriter` has written. A row is made when it is read.

    Args:
        table: the table, mapped into memory.
        only: index of the only teacher whose side is read.
        path: the file, from which another process opens the table again.
    """

    def __init__(self, table: Any, only: int | None = None, path: Path | None = None) -> None:
        self.table, self.only, self.path = table, only, path

    def __reduce__(self) -> Any:
        if self.path is None or not self.path.is_file():
            return StoredRows, (self.table, self.only)
        return _reopened, (self.path, self.only)

    @classmethod
    def open(cls, path: Path) -> "StoredRows":
        """Map a file into memory."""
        return cls(pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all(), path=path)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = {name: self.table[name][index] for name in _SCHEMA.names}
        plain = {name: row[name].as_py() for name in _SCHEMA.names[:5]}
        tokens = [[_array(side) for side in row[name].values] for name in ("ids", "byte_ends", "aligned_rows")]
        student, *teachers = (
            EncodedSide(ids, count, ends, aligned)
            for ids, count, ends, aligned in zip(tokens[0], row["num_prompt"].as_py(), *tokens[1:], strict=True)
        )
        own = teachers if self.only is None else teachers[self.only : self.only + 1]
        return EncodedRow(student=student, teachers=tuple(own), **plain)

    def lengths(self, side: int) -> list[int]:
        """Return the number of tokens of each row that the student (0) or a teacher, from 1, reads."""
        place = side if not side or self.only is None else self.only + 1
        return list(pyarrow.compute.list_element(self.table["lengths"], place).to_pylist())

    def of_teacher(self, index: int) -> "StoredRows":
        """Return the rows that one of several teachers teaches, with only this teacher."""
        chosen = self.table["chosen"]
        table = self.table
        if chosen.null_count < len(chosen):
            table = table.filter(pyarrow.compute.equal(chosen, index))
        return StoredRows(table, index, self.path)


def _reopened(path: Path, only: int | None) -> StoredRows:
    rows = StoredRows.open(path)
    return rows if only is None else rows.of_teacher(only)


def _array(tokens: Any) -> NDArray[np.int32] | None:
    """Return the integers of a list in a table without a copy, or None for a list that is null."""
    return tokens.values.to_numpy() if tokens.is_valid else None


@dataclass(eq=False)
class EncodedPairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Data set of encoded rows. Its items are dicts of lists for `dwakd.data.collator.collate`."""

    rows: Sequence[EncodedRow]
    report: dict[str, list[int]]  # indices in the source of the rows that were skipped, by reason
    source: str = "the data set passed in"  # name in messages

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        student, teachers = row.student.features(), [side.features() for side in row.teachers]
        return {"example_id": row.example_id, "chosen": row.chosen, "student": student, "teachers": teachers}

    @property
    def examined(self) -> Sequence[EncodedRow]:
        """Rows that show which fields are set: the first one of a file, whose rows are made in the same way, or all rows."""
        return self.rows[:1] if isinstance(self.rows, StoredRows) else self.rows

    def of_teacher(self, index: int) -> "EncodedPairs":
        """Return the rows that one of several teachers teaches, with only this teacher."""
        if isinstance(self.rows, StoredRows):
            return replace(self, rows=self.rows.of_teacher(index))
        rows = [row for row in self.rows if row.chosen in (None, index)]
        return replace(self, rows=[replace(row, teachers=(row.teachers[index],)) for row in rows])

    @property
    def num_truncated(self) -> int:
        """Number of rows with a truncated response."""
        if isinstance(self.rows, StoredRows):
            return int(pyarrow.compute.sum(self.rows.table["truncated"]).as_py() or 0)
        return sum(row.truncated for row in self.rows)

    def lengths(self, side: int) -> list[int]:
        """Return the number of tokens of each row that the student (0) or a teacher, from 1, reads."""
        if isinstance(self.rows, StoredRows):
            return self.rows.lengths(side)
        return [(row.student, *row.teachers)[side].length for row in self.rows]

    @property
    def student_lengths(self) -> list[int]:
        """Number of tokens that the student reads in each row, used to group rows of similar length."""
        return self.lengths(0)
