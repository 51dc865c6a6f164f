"""Running the teacher once over everything that a cache is to hold."""

import errno
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.cache.files import MISSING
from dwakd.cache.index import side_key, teacher_side
from dwakd.cache.manifest import MANIFEST, TEACHER, check_folder, human_bytes
from dwakd.cache.store import Cache
from dwakd.data.pairs import EncodedPairs, EncodedSide
from dwakd.errors import UserError
from dwakd.models.invariant import response_hidden
from dwakd.models.rows import embedding_table, output_head

logger = logging.getLogger(__name__)

_CHUNK_TOKENS = 16_384
"""Of one call of the model on an accelerator."""


@dataclass(frozen=True)
class Order:
    """What a cache has to hold and who builds it.

    Args:
        sets: "train" and, if there is one, "eval".
        fingerprint: see `dwakd.cache.fingerprint`.
        names: what to call teacher, adapter and tokenizer.
        dtype: to store; the teacher's own if None.
        rank: of this process.
        world_size: how many processes build.
        progress: whether to show bars and sizes.
    """

    sets: Mapping[str, EncodedPairs]
    fingerprint: dict[str, str]
    names: dict[str, str]
    dtype: torch.dtype | None = None
    rank: int = 0
    world_size: int = 1
    progress: bool = True


def obtain(folder: Path, order: Order, load: Callable[[], nn.Module], *, mend: bool = False) -> Cache:
    """The cache in a folder, verified; what isn't there yet is built.

    Args:
        folder: need not exist.
        order: what the cache must hold.
        load: gives the teacher, on the device where it is to run; called only if something has to be built.
        mend: build damaged files anew instead of refusing them.

    Raises:
        UserError: the cache was built from something else, a file is damaged, or the disk is full.
    """
    check_folder(folder)
    cache, faults, teacher = None, {}, None
    if (folder / MANIFEST).is_file():
        cache = Cache.open(folder)
        cache.check_belongs(order.fingerprint, order.names, order.sets)
        _check_dtype(cache, order.dtype)
        faults = cache.faults(order.rank, order.world_size, progress=order.progress)
        if not mend:
            cache.refuse(faults)
    if cache is None or faults:
        teacher = load()
    if cache is None:
        assert teacher is not None
        cache = _create(folder, order, teacher)
        faults = cache.faults(order.rank, order.world_size, progress=order.progress)
    if faults:
        assert teacher is not None
        _Builder(cache, order, teacher).run(faults)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if order.rank == 0:
        cache.tidy()
    return cache


def _create(folder: Path, order: Order, teacher: nn.Module) -> Cache:
    if not order.sets:
        raise UserError(f"teacher cache {folder} cannot be built without rows: give train_dataset or eval_dataset")
    dtype = order.dtype or output_head(teacher).weight.dtype
    parts = (embedding_table(teacher), output_head(teacher))
    try:
        return Cache.create(folder, order.sets, order.fingerprint, order.names, parts, dtype)
    except OSError as error:
        raise _disk_error(folder, error, "nothing of it is finished") from error


def _check_dtype(cache: Cache, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != cache.dtype:
        raise UserError(
            f"teacher cache {cache.folder} holds {cache.manifest.dtype} and teacher.cache_dtype is "
            f"{str(dtype).removeprefix('torch.')}; name another folder, or leave teacher.cache_dtype away"
        )


class _Builder:
    """Builds the files of one rank that are missing or damaged."""

    def __init__(self, cache: Cache, order: Order, teacher: nn.Module) -> None:
        self.cache = cache
        self.order = order
        self.teacher = teacher
        self.device = next(teacher.parameters()).device
        self.sides = {
            side_key(teacher_side(row)): teacher_side(row) for pairs in order.sets.values() for row in pairs.rows
        }

    def run(self, faults: Mapping[str, str]) -> None:
        """Build what has a fault, one shard after the other."""
        self._check_data()
        for name, wrong in faults.items():
            if wrong != MISSING:
                logger.warning("%s of teacher cache %s %s and is built anew", name, self.cache.folder, wrong)
        mine = range(self.order.rank, self.cache.num_shards, self.order.world_size)
        shards = [shard for shard in mine if self.cache.shard_path(shard).name in faults]
        self._announce(len(mine), shards)
        finished = len(mine) - len(shards)
        total = sum(self._side(row).length for shard in shards for row in self.cache.index.rows_of(shard))
        with tqdm(
            total=total, desc="teacher cache", unit="tok", unit_scale=True, disable=not self.order.progress
        ) as bar:
            try:
                if TEACHER in faults:
                    self.cache.write_teacher(embedding_table(self.teacher), output_head(self.teacher))
                for shard in shards:
                    self.cache.write_shard(shard, self._hidden(shard, bar))
                    finished += 1
            except OSError as error:
                state = f"{finished} of {len(mine)} shards are finished and stay good"
                raise _disk_error(self.cache.folder, error, state) from error

    def _check_data(self) -> None:
        absent = sum(key not in self.sides for key in self.cache.index.keys)
        if absent:
            raise UserError(
                f"teacher cache {self.cache.folder} is not whole and {absent} of its rows are not in this data; "
                "finish it with the data it was begun with, or name another folder in teacher.cache"
            )

    def _announce(self, num_mine: int, shards: list[int]) -> None:
        """Say what is coming; refuse if it cannot fit."""
        needed = sum(self.cache.index.shard_lengths[shard] for shard in shards) * self.cache.row_bytes
        free = shutil.disk_usage(self.cache.folder).free
        if needed > free:
            raise UserError(
                f"the disk of teacher cache {self.cache.folder} is too full: {human_bytes(needed)} are needed and "
                f"{human_bytes(free)} are free ({num_mine - len(shards)} of {num_mine} shards are finished and stay "
                "good); make room, or name another folder in teacher.cache"
            )
        if self.order.progress:
            done = f"; {num_mine - len(shards)} shards are there already" if len(shards) < num_mine else ""
            part = f", {len(shards)} for this process" if self.order.world_size > 1 else ""
            text = f"teacher cache {self.cache.folder}: {self.cache.describe()}{part}{done}; {human_bytes(free)} free"
            tqdm.write(text, file=sys.stderr)

    def _side(self, row: int) -> EncodedSide:
        return self.sides[self.cache.index.keys[row]]

    def _hidden(self, shard: int, bar: Any) -> torch.Tensor:
        index = self.cache.index
        rows = sorted(index.rows_of(shard), key=lambda row: self._side(row).length)
        hidden = torch.empty(index.shard_lengths[shard], self.cache.hidden_size, dtype=self.cache.dtype)
        while rows:
            longest = max(self._side(row).length for row in rows[-1:])
            count = max((_CHUNK_TOKENS if self.device.type != "cpu" else 1024) // longest, 1)
            chunk, rows = rows[-count:], rows[:-count]
            sides = [self._side(row) for row in chunk]
            ids = [torch.from_numpy(side.ids[:-1]).long().to(self.device) for side in sides]
            found = response_hidden(self.teacher, ids, [len(side.byte_ends) for side in sides])
            for row, states in zip(chunk, found, strict=True):
                start = int(index.offsets[row])
                hidden[start : start + len(states)] = states
            bar.update(sum(side.length for side in sides))
        return hidden


def _disk_error(folder: Path, error: OSError, state: str) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else f"the disk says {error.strerror or error}"
    return UserError(
        f"teacher cache {folder} cannot be written: {reason}; {state}; make room and run it again to go on"
    )
