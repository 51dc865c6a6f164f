"""Keep the encoded rows of a data set in a file, so that they need little memory and are encoded only once."""

import json
import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from dwakd.cache.fingerprint import DATE, file_digest, fingerprint, json_digest
from dwakd.checksums import code_digest
from dwakd.data.encoded import EncodedPairs, RowWriter, StoredRows
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import RowSource
from dwakd.errors import UserError
from dwakd.folders import write_json
from dwakd.recipe.training import DistillConfig

logger = logging.getLogger(__name__)

_PACKAGES = ("dwakd", "transformers", "tokenizers", "datasets", "jinja2")
_OPTIONS = ("max_prompt_length", "invalid_rows", "teacher_key", "teacher_names", "lmbda")


def stored_pairs(
    rows: RowSource,
    encoders: Sequence[TextEncoder],
    args: DistillConfig,
    encode: Callable[[RowWriter | None], EncodedPairs],
) -> EncodedPairs:
    """Encode the rows of a source, or read them from the cache of `datasets` if they were encoded before.

    The file depends on everything that changes the rows: the data, the tokenizers, templates and options, and the versions
    of packages. A damaged file is made again. Warnings of the encoding are repeated when it is read. Of several processes,
    only one encodes.

    Args:
        rows: the data set. Rows that are in memory already are encoded in memory.
        encoders: the encoder of the student, then that of each teacher.
        args: the training arguments.
        encode: encodes the rows into a file, or in memory if its argument is None.
    """
    digest = rows.digest() if datasets.is_caching_enabled() else None
    if digest is None:
        return encode(None)
    path = (
        Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "dwakd" / f"{_key(rows, digest, encoders, args)}.arrow"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            return _read(path, rows.title) or _build(path, encode)
    except OSError as error:
        raise UserError(
            f"{path.parent}: the encoded rows cannot be stored ({error.strerror or error}): set the variable "
            "HF_DATASETS_CACHE to a folder that can be written"
        ) from error


def _key(rows: RowSource, digest: str, encoders: Sequence[TextEncoder], args: DistillConfig) -> str:
    sides = []
    for encoder in encoders:
        side = fingerprint(encoder, bos=args.bos, max_length=args.max_length, teacher="", adapter=None, dtype="")
        side[DATE] = encoder.printed_date or ""
        sides.append([side, encoder.end_token_id, encoder.tokenizer.special_tokens_map])
    source = {name: str(value) for name, value in vars(rows).items()} | {"source": str(rows.source)[:1000]}
    options = [*(getattr(args, name) for name in _OPTIONS), args.method_options.needs_edit_alignment]
    versions = [*(metadata.version(name) for name in _PACKAGES), code_digest()]
    return json_digest([digest, source, sides, options, versions])[:32]


def _read(path: Path, name: str) -> EncodedPairs | None:
    """Return the rows of a file and repeat its warnings; None if there is no file, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        is_whole = about["sha256"] == file_digest(path)
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        logger.warning("the encoded rows of %s in %s are damaged: they are encoded again", name, path)
        return None
    for logger_name, message in about["warnings"]:
        logging.getLogger(logger_name).warning("%s", message)
    return EncodedPairs(StoredRows.open(path), about["report"], about["source"])


def _build(path: Path, encode: Callable[[RowWriter | None], EncodedPairs]) -> EncodedPairs:
    """Encode the rows into a file."""
    recorder = _Recorder()
    unfinished = path.with_suffix(".tmp")
    logging.getLogger("dwakd").addHandler(recorder)
    try:
        pairs = encode(RowWriter(unfinished))
        about: dict[str, Any] = {"sha256": file_digest(unfinished), "report": pairs.report, "source": pairs.source}
        path.with_suffix(".json").unlink(missing_ok=True)
        unfinished.replace(path)
        pairs.rows = StoredRows.open(path)
        write_json(path.with_suffix(".json"), about | {"warnings": recorder.messages})
    finally:
        logging.getLogger("dwakd").removeHandler(recorder)
        unfinished.unlink(missing_ok=True)
    return pairs


class _Recorder(logging.Handler):
    """Collect the warnings that are logged, with the names of their loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a warning."""
        self.messages.append((record.name, record.getMessage()))
