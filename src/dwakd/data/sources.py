"""Load and check the rows of a data set from the Hugging Face Hub, a local file or memory."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from dwakd.data.files import SUFFIXES, PlacedRow, Select, numbered, read_file, stream_jsonl
from dwakd.data.rows import INVALID_ROWS, SUPERVISE, Columns, Example, check_row
from dwakd.errors import UserError, explained
from dwakd.validation import check_choice

__all__ = ["EVAL_SPLITS", "SUFFIXES", "TEST_SPLITS", "TRAIN_SPLITS", "Example", "RowSource", "load_examples"]

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
    return list(RowSource(**locals()))


@dataclass(frozen=True)
class RowSource:
    """A data set whose rows are read again each time it is iterated. The fields are the arguments of `load_examples`."""

    source: Any
    split: str | Sequence[str] = "train"
    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    teacher_prompt: str | None = None
    teacher_key: str | None = None
    supervise: str = "last"
    limit: int | None = None
    need_response: bool = True
    invalid_rows: str = "error"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit must be at least 1, got {self.limit}")
        check_choice("data.invalid_rows", self.invalid_rows, INVALID_ROWS)
        check_choice("data.supervise", self.supervise, SUPERVISE)

    @property
    def title(self) -> str:
        """The name of the source in messages."""
        return self.name or (str(self.source) if isinstance(self.source, str | Path) else "the data set passed in")

    def __iter__(self) -> Iterator[Example]:
        errors: list[str] = []
        num_rows = num_examples = 0
        for num_rows, (where, row, columns) in enumerate(self._placed(), 1):
            try:
                check_row(row)
                found = [] if columns is None else columns.read(row, num_rows - 1)
            except UserError as error:
                errors.append(f"{where}: {error}: correct or remove that row")
                if self.invalid_rows == "error":
                    raise UserError(f"{errors[0]}; in training, data.invalid_rows: skip leaves it out") from error
                continue
            for example in found:
                yield replace(example, index=num_examples) if self.supervise == "all" else example
                num_examples += 1
        if not num_examples:
            raise UserError(f"{self.title}: none of its {num_rows} rows can be used; first error: {errors[0]}")
        if errors:
            logger.warning(
                "%s: skipping %d of %d rows, which are malformed; first error: %s",
                *(self.title, len(errors), num_rows, errors[0]),
            )

    def _placed(self) -> Iterator[tuple[str, Any, Columns | None]]:
        """Read the rows with their places and the columns, which are searched in the keys of all rows."""

        def read() -> Iterator[PlacedRow]:
            return islice(rows(lambda names: self.columns(names).used), self.limit)

        with explained(f"{self.title:.500}: cannot be read"):
            source = _loaded(self.source, self.split, self.title)
            rows = _open(source, self.title, self.limit)
            keys, is_empty = dict[str, None](), True
            for _, row in islice(read(), 1 if isinstance(source, datasets.Dataset) else None):
                keys |= dict.fromkeys(map(str, row)) if isinstance(row, Mapping) else {}
                is_empty = False
        if is_empty:
            raise UserError(f"{self.title} is empty: use a data set with at least one row")
        columns = self.columns(keys) if keys else None
        with explained(f"{self.title:.500}: cannot be read"):
            for where, row in read():
                yield where, row, columns

    def columns(self, names: Iterable[str]) -> Columns:
        """Choose the columns to read from the names of all columns."""
        given = {name: getattr(self, name) for name in ("prompt", "response", "input", "teacher_prompt", "teacher_key")}
        return Columns.find(names, self.title, given, self.need_response, self.supervise)

    def stream(self) -> Iterator[PlacedRow]:
        """Read the rows with their places once, and keep none of them. Lines that cannot be parsed are UserErrors.

        Raises:
            UserError: the source cannot be read in this way.
        """
        with explained(f"{self.title:.500}: cannot be read"):
            source = _loaded(self.source, self.split, self.title, streaming=True)
            found = _file(source)
            if found is None:
                yield from _open(source, self.title, None, keep=False)(lambda names: self.columns(names).used)
                return
            path, start, stop = found
            if path.suffix.lower() not in (".jsonl", ".parquet"):
                raise UserError(f"{self.title}: data.streaming reads .jsonl and .parquet files, but not {path.suffix}")
            is_json = path.suffix.lower() == ".jsonl"
            select: Select = lambda names: self.columns(names).used  # noqa: E731
            rows = stream_jsonl(path, self.title) if is_json else read_file(path, self.title, select)
            yield from islice(rows, start, stop)

    def digest(self) -> str | None:
        """Return a digest of the content of a file, or of a data set that `datasets` has stored; None for other sources."""
        with explained(f"{self.title:.500}: cannot be read"):
            source = _loaded(self.source, self.split, self.title)
            if isinstance(source, datasets.Dataset):
                return str(source._fingerprint)
            found = _file(source)
            if found is None:
                return None
            with found[0].open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()


def _file(source: Any) -> tuple[Path, int, int | None] | None:
    """Return the path of a file and its first and last row; None for other sources. A file of the Hub is downloaded."""
    if isinstance(source, str) and (found := _FILE.fullmatch(source)):
        repo, path = found["repo"], found["file"]
        if repo:  # not by `datasets`, which cannot read columns that mix strings and lists
            with explained(f"could not load the file {path} of the data set {repo} from the Hugging Face Hub"):
                path = huggingface_hub.hf_hub_download(repo, path, repo_type="dataset")
        return Path(path).expanduser(), int(found["start"] or 0), int(found["stop"]) if found["stop"] else None
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        return Path(source).expanduser(), 0, None
    return None


def _loaded(source: Any, split: str | Sequence[str], name: str, *, streaming: bool = False) -> Any:
    """Load a data set of the Hub and choose a split. Files and other data sets are returned unchanged."""
    if isinstance(source, str) and not (_FILE.fullmatch(source) or _is_path(source)):
        place, _, own_split = source.partition("@")
        if Path(place).suffix.lower() in SUFFIXES:
            raise UserError(f"{source}: the rows of a file are given as {place}@[start:stop], with whole numbers")
        path, _, config = place.partition(":")
        split = own_split or split
        only = split if isinstance(split, str) else None  # otherwise all, to choose one
        what = f"{place[:500]!r} (split {only or split[0]!r})"
        with explained(f"could not load {what} from the Hugging Face Hub, and no such file exists"):
            options = {"streaming": True} if streaming else {}
            source = datasets.load_dataset(path, config or None, split=only, **options)
    if isinstance(source, datasets.Dataset) and source.format["type"] == "custom":
        raise UserError(
            f"{name} has a transform (with_transform or set_transform), which would be left out: apply it with map"
        )
    if isinstance(source, Mapping):
        return _loaded(source[_choose_split(source, split, name)], split, name)
    return source


def _open(source: Any, name: str, limit: int | None, *, keep: bool = True) -> Callable[[Select], Iterator[PlacedRow]]:
    """Return a function that reads the rows of a source with their places, as often as it is called.

    Only the columns that its argument selects are read where possible. No more than `limit` rows of a stream are read.
    """
    if found := _file(source):
        path, start, stop = found
        return lambda select: islice(read_file(path, name, select), start, stop)
    if not isinstance(source, datasets.Dataset | datasets.IterableDataset | Sequence):
        kind = type(source).__name__
        raise UserError(f"cannot read rows from {kind}: use a Hub id, a file, a datasets.Dataset or a list of dicts")
    kept: list[PlacedRow] = []

    def read(select: Select) -> Iterator[PlacedRow]:
        if isinstance(source, Sequence):
            return numbered(source, name)
        rows = source.with_format(None)
        if rows.column_names:  # columns that are not read may be slow or impossible to decode
            rows = rows.select_columns(select(rows.column_names))
        if isinstance(source, datasets.Dataset) or not keep:
            return numbered(rows, name)
        kept[:] = kept or islice(numbered(rows, name), limit)  # a stream may be read only once
        return iter(kept)

    return read


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
