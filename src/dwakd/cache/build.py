"""Build a cache: run the teacher once over every row, in this process or in another engine."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.batch import OutputHead
from dwakd.cache.manifest import MANIFEST, MISSING, TEACHER, keyed_sides
from dwakd.cache.store import Cache, CacheRequest
from dwakd.data.encoded import EncodedSide
from dwakd.errors import UserError
from dwakd.folders import UNFINISHED
from dwakd.models.head import embedding_table, output_head
from dwakd.models.rows import response_hidden

logger = logging.getLogger(__name__)

_CHUNK_TOKENS, _CPU_CHUNK_TOKENS = 16_384, 1_024  # tokens in one forward pass, padding included


@runtime_checkable
class Engine(Protocol):
    """A teacher that computes what a cache stores."""

    table: Tensor
    head: OutputHead
    width: int
    """Width of the stored states."""
    chunk_tokens: int
    """Number of tokens, padding included, for which states are computed at a time."""

    def states(self, sides: Sequence[EncodedSide]) -> list[Tensor]:
        """Compute the states of the response tokens of each row."""


class ModelEngine:
    """A teacher that is loaded into this process. It stores its final hidden states."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.table, self.head = model, embedding_table(model), output_head(model)
        self.width, self.device = self.head.hidden_size, next(model.parameters()).device
        self.chunk_tokens = _CPU_CHUNK_TOKENS if self.device.type == "cpu" else _CHUNK_TOKENS

    def states(self, sides: Sequence[EncodedSide]) -> list[Tensor]:
        ids = [torch.tensor(side.ids[:-1], dtype=torch.long, device=self.device) for side in sides]
        return response_hidden(self.model, ids, [len(side.byte_ends) for side in sides])


def open_or_build(folder: Path, request: CacheRequest, load: Callable[[], Engine], *, repair: bool = False) -> Cache:
    """Open and verify the cache in a folder. Files that are missing are built, and with `repair` also damaged ones.

    `load` prepares the teacher; it is called only if something has to be built.

    Raises:
        UserError: the cache was built with other models, options or data, a file is damaged, or the disk is full.
    """
    teacher = None
    if (folder / MANIFEST).is_file():
        cache = Cache.open(folder)
        cache.check_source(request)
    elif request.sets:
        teacher, repair = load(), True
        with _disk_errors(folder):
            cache = Cache.create(folder, request, teacher.table, teacher.head, teacher.width)
    else:
        raise UserError(f"teacher cache {folder} cannot be built without rows: give train_dataset or eval_dataset")
    problems = cache.problems(request.rank, request.world_size, progress=request.progress)
    if not repair:
        cache.refuse_damaged(problems)
    if problems:
        teacher = load() if teacher is None else teacher
        with _disk_errors(folder):
            _build(cache, request, teacher, problems)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if request.rank == 0:
        for path in folder.glob(f".*{UNFINISHED}*"):  # remove temporary files of killed processes
            path.unlink(missing_ok=True)
    return cache


def _build(cache: Cache, request: CacheRequest, teacher: Engine, problems: Mapping[str, str]) -> None:
    """Build the missing and damaged files of one rank."""
    sides = dict(keyed_sides(*request.sets.values()))
    if absent := len(cache.index.places.keys() - sides.keys()):
        raise UserError(
            f"teacher cache {cache.folder} is incomplete and {absent} of its rows are not in this data; complete it "
            "with the data that it was started with, or name another folder in teacher.cache"
        )
    for name, problem in problems.items():
        if problem != MISSING:
            logger.warning("building %s of teacher cache %s again: it %s", name, cache.folder, problem)
    shards = [shard for shard in range(cache.num_shards) if cache.shard_path(shard).name in problems]
    needed = sum(cache.index.shard_lengths[shard] for shard in shards) * cache.token_bytes
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise UserError(
            f"teacher cache {cache.folder} needs {decimal(needed)} more, but the disk has only {decimal(free)} free "
            f"({_finished(cache.folder)}); free some space, or name another folder in teacher.cache"
        )
    if request.progress:
        work = f"{len(shards)} shards to build by process {request.rank + 1} of {request.world_size}"
        text = f"{cache.describe()}; {work}, {_finished(cache.folder)}, {decimal(free)} free"
        tqdm.write(f"teacher cache {cache.folder}: {text}", file=sys.stderr)
    if TEACHER in problems:
        cache.write_teacher(teacher.table, teacher.head)
    rows = [sides[key] for key in cache.index.places]
    total = sum(rows[row].length for shard in shards for row in cache.index.rows_of(shard))
    with tqdm(total=total, desc="teacher cache", unit="tok", unit_scale=True, disable=not request.progress) as bar:
        for shard in shards:
            cache.write_shard(shard, _hidden_states(cache, shard, rows, teacher, bar))


def _hidden_states(cache: Cache, shard: int, sides: list[EncodedSide], teacher: Engine, bar: Any) -> Tensor:
    """Compute the hidden states of one shard, longest rows first."""
    rows = sorted(cache.index.rows_of(shard), key=lambda row: sides[row].length)
    hidden = torch.empty(cache.index.shard_lengths[shard], cache.manifest.hidden_size, dtype=cache.dtype)
    while rows:
        count = max(teacher.chunk_tokens // sides[rows[-1]].length, 1)
        chunk, rows = rows[-count:], rows[:-count]
        states = teacher.states([sides[row] for row in chunk])
        for row, part in zip(chunk, states, strict=True):
            start = int(cache.index.offsets[row])
            hidden[start : start + len(part)] = part
        bar.update(sum(sides[row].length for row in chunk))
    return hidden


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError of one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"teacher cache {folder} cannot be written: {error.strerror or error} ({_finished(folder)}); free some "
            "space or correct the folder, then run the command again to continue"
        ) from error


def _finished(folder: Path) -> str:
    return f"{len(list(folder.glob('shard-*')))} shards are written and kept"
