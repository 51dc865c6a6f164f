"""Read and encode rows while the training runs, so that a data set may be larger than memory (`data.streaming`)."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import Sampler

from dwakd.batch import PairedBatch
from dwakd.data.encoded import EncodedPairs, EncodedRow
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import NOTHING_SUPERVISED, Finish, InvalidRowError, encode_rows
from dwakd.data.rows import Example, check_row
from dwakd.data.sources import RowSource
from dwakd.errors import UserError

logger = logging.getLogger(__name__)

Slot: TypeAlias = Example | InvalidRowError
"""A row of a batch, or the reason why it has none. Batches do not depend on which rows can be encoded."""
Collate: TypeAlias = Callable[[Sequence[dict[str, Any]]], PairedBatch]
_MALFORMED = "malformed"


class StreamedBatch(NamedTuple):
    """A batch as a worker returns it: the rows that can be used, and the errors of the others."""

    batch: PairedBatch | None
    errors: list[InvalidRowError]


class StreamedRows(torch.utils.data.Dataset[Any]):
    """Encode the rows of a stream, a batch at a time, in the workers of a data loader.

    Args:
        rows: the data set. It is read again from the start when it ends.
        encoders: the encoder of the student, then that of each teacher.
        limits: `max_length`, `max_prompt_length` and `need_response` of `encode_pairs`.
        finish: changes each encoded row, given its example.
    """

    def __init__(
        self, rows: RowSource, encoders: Sequence[TextEncoder], limits: dict[str, Any], finish: Finish
    ) -> None:
        self.rows, self._encoders, self._limits, self._finish = rows, encoders, limits, finish
        self.skipped: Counter[str] = Counter()
        self._last: PairedBatch | None = None

    def __getitems__(self, slots: Sequence[Slot]) -> list[dict[str, Any] | InvalidRowError]:
        found: list[EncodedRow | InvalidRowError] = [slot for slot in slots if isinstance(slot, InvalidRowError)]
        examples = [slot for slot in slots if isinstance(slot, Example)]
        if not self._limits["need_response"]:
            examples = [replace(example, response="", answer=None) for example in examples]
        for example, row, _ in encode_rows(examples, self._encoders, **self._limits):
            try:
                found.append(self._finish(row, example) if isinstance(row, EncodedRow) else row)
            except UserError as error:
                found.append(InvalidRowError(_MALFORMED, str(error)))
        items = EncodedPairs([row for row in found if isinstance(row, EncodedRow)], {})
        return [*(items[n] for n in range(len(items))), *(row for row in found if isinstance(row, InvalidRowError))]

    def accept(self, batch: StreamedBatch, collate: Collate) -> PairedBatch:
        """Return the rows of a batch; raise or count its errors, as `invalid_rows` says.

        A batch without rows repeats a row with weight 0, because all ranks must take part in each step: one of the batch
        before, or the first one of the stream.
        """
        name = self.rows.title
        for error in batch.errors:
            if self.rows.invalid_rows == "error" and error.reason != NOTHING_SUPERVISED:
                if error.reason == _MALFORMED:
                    raise UserError(f"{error}, or set data.invalid_rows: skip")
                raise UserError(f"{name}, {error}; correct the data or set data.invalid_rows: skip")
            if not self.skipped[error.reason]:
                logger.warning("skipping rows: %s (%s)", error.reason, error)
            self.skipped[error.reason] += 1
        if batch.batch is not None:
            self._last = batch.batch
            return batch.batch
        self._last = self._last or self._first(collate)
        return replace(self._last.examples([0]), weight=0.0)

    def _first(self, collate: Collate) -> PairedBatch:
        """Return the first row of the stream that can be encoded."""
        for slot in RowBatches(self.rows, 1, 0, 1).read():
            for item in self.__getitems__([slot]):
                if isinstance(item, dict):
                    return collate([item])
        raise UserError(f"{self.rows.title}: no row can be used: correct the data")

    def report(self) -> None:
        """Warn about the rows that this process has skipped."""
        if total := sum(self.skipped.values()):
            counts = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.items())
            logger.warning("%s: skipped %d rows (%s)", self.rows.title, total, counts)


class RowBatches(Sampler[list[Slot]]):
    """Read the rows of a stream in their order, and divide them into batches for the ranks.

    With n ranks, batch k of rank r has the rows from (k n + r) `batch_size` on. A resumed run skips rows without encoding
    them.
    """

    def __init__(self, rows: RowSource, batch_size: int, rank: int, world_size: int) -> None:
        self.rows, self.batch_size, self.rank, self.world_size = rows, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[Slot]]:
        slots, start = self._slots(), self.rank * self.batch_size
        while True:
            yield list(islice(slots, self.batch_size * self.world_size))[start : start + self.batch_size]

    def _slots(self) -> Iterator[Slot]:
        for passes in count(1):
            num_examples = 0
            for slot in self.read():
                num_examples += isinstance(slot, Example)
                yield slot
            if not num_examples:
                raise UserError(f"{self.rows.title} has no row that can be used: use a data set with at least one row")
            logger.warning(
                "%s ended after %d rows and is read again (pass %d)", self.rows.title, num_examples, passes + 1
            )

    def read(self) -> Iterator[Slot]:
        """Read the data set once. Its columns are those of the first row that is an object."""
        columns, number = None, 0
        for index, (where, row) in enumerate(islice(self.rows.stream(), self.rows.limit)):
            try:
                if isinstance(row, UserError):
                    raise row
                check_row(row)
                columns = columns or self.rows.columns(row)
                examples = columns.read(row, index)
            except UserError as error:
                if columns is None and not isinstance(row, UserError):
                    raise
                problem = str(error) if isinstance(row, UserError) else f"{where}: {error}: correct or remove that row"
                yield InvalidRowError(_MALFORMED, problem)
                continue
            for example in examples:
                yield replace(example, index=number) if self.rows.supervise == "all" else example
                number += 1


def use_one_thread(worker: int) -> None:
    """Prepare a worker: tokenizers must not use threads in a process that was forked, and would warn."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def collate_stream(items: Sequence[Any], collate: Collate) -> StreamedBatch:
    """Collate the rows that could be encoded."""
    rows = [item for item in items if isinstance(item, dict)]
    return StreamedBatch(collate(rows) if rows else None, [item for item in items if isinstance(item, InvalidRowError)])
