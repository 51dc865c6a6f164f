"""Build a cache: run the teacher once over every row."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.cache.manifest import MANIFEST, MISSING, TEACHER, keyed_sides
from dwakd.cache.store import Cache, CacheRequest
from dwakd.data.pairs import EncodedSide
from dwakd.errors import UserError
from dwakd.folders import UNFINISHED
from dwakd.models.head import embedding_table, output_head
from dwakd.models.rows import response_hidden

logger = logging.getLogger(__name__)

_CHUNK_TOKENS, _CPU_CHUNK_TOKENS = 16_384, 1_024  # tokens in one forward pass, padding included


def open_or_build(folder: Path, request: CacheRequest, load: Callable[[], nn.Module], *, repair: bool = False) -> Cache:
    """Open and verify the cache in a folder. Files that are missing are built, and with `repair` also damaged ones.

    `load` loads the teacher on the device where it runs; it is called only if something has to be built.

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
            cache = Cache.create(folder, request, embedding_table(teacher), output_head(teacher))
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


def _build(cache: Cache, request: CacheRequest, teacher: nn.Module, problems: Mapping[str, str]) -> None:
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
        cache.write_teacher(embedding_table(teacher), output_head(teacher))
    rows = [sides[key] for key in cache.index.places]
    total = sum(rows[row].length for shard in shards for row in cache.index.rows_of(shard))
    with tqdm(total=total, desc="teacher cache", unit="tok", unit_scale=True, disable=not request.progress) as bar:
        for shard in shards:
            cache.write_shard(shard, _hidden_states(cache, shard, rows, teacher, bar))


def _hidden_states(cache: Cache, shard: int, sides: list[EncodedSide], teacher: nn.Module, bar: Any) -> torch.Tensor:
    """Compute the hidden states of one shard, longest rows first."""
    device = next(teacher.parameters()).device
    limit = _CPU_CHUNK_TOKENS if device.type == "cpu" else _CHUNK_TOKENS
    rows = sorted(cache.index.rows_of(shard), key=lambda row: sides[row].length)
    hidden = torch.empty(cache.index.shard_lengths[shard], cache.manifest.hidden_size, dtype=cache.dtype)
    while rows:
        count = max(limit // sides[rows[-1]].length, 1)
        chunk, rows = rows[-count:], rows[:-count]
        ids = [torch.from_numpy(sides[row].ids[:-1]).long().to(device) for row in chunk]
        states = response_hidden(teacher, ids, [len(sides[row].byte_ends) for row in chunk])
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
