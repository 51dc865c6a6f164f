"""A teacher cache: a folder of shards, their index, the teacher's embedding table and head, and a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.cache.files import (
    MISSING,
    UNFINISHED,
    Layout,
    MappedRows,
    fault,
    file_digest,
    read_tensors,
    write_tensors,
    write_whole,
)
from dwakd.cache.fingerprint import difference
from dwakd.cache.index import Index
from dwakd.cache.manifest import INDEX, MANIFEST, TEACHER, Manifest, broken, check_folder, human_bytes
from dwakd.data.pairs import EncodedPairs, EncodedRow
from dwakd.errors import UserError
from dwakd.models.head import OutputHead


class Cache:
    """The final hidden states of the response rows of some sets, by what the teacher reads of each row.

    A set is served if all its rows are held, in whatever order and number: content identifies a row.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder = folder
        self.manifest = manifest
        self.index = index
        self._maps: dict[int, MappedRows] = {}

    @classmethod
    def open(cls, folder: Path) -> Cache:
        """Open a cache whose plan is there, finished or not.

        Raises:
            UserError: its manifest or its index is damaged.
        """
        manifest = Manifest.load(folder)
        path = folder / INDEX
        if not path.is_file():
            raise broken(folder, INDEX, MISSING)
        if file_digest(path) != manifest.index:
            raise broken(folder, INDEX, "is damaged (it does not match its checksum), or belongs to another cache")
        return cls(folder, manifest, Index.from_tensors(read_tensors(path)))

    @classmethod
    def create(
        cls,
        folder: Path,
        sets: Mapping[str, EncodedPairs],
        fingerprint: dict[str, str],
        names: dict[str, str],
        teacher: tuple[Tensor, OutputHead],
        dtype: torch.dtype,
    ) -> Cache:
        """Plan a cache and write everything but its shards. Every rank may do so: all write the same."""
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table, head = teacher
        index = Index.plan(sets, head.hidden_size * dtype.itemsize)
        write_tensors(folder / INDEX, index.tensors(), {"cache": "any"})
        tensors = _teacher_tensors(table, head)
        layout = {name: (_word(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
        manifest = Manifest(
            fingerprint, names, _word(dtype), file_digest(folder / INDEX), layout, head.scale, head.soft_cap
        )
        cache = cls(folder, manifest, index)
        cache.write_teacher(table, head)
        write_whole(folder / MANIFEST, [manifest.dump().encode()])
        return cache

    # What it holds.

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.manifest.dtype)

    @property
    def num_shards(self) -> int:
        return len(self.index.shard_lengths)

    @cached_property
    def hidden_size(self) -> int:
        return self.manifest.teacher["head.weight"][1][1]

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def describe(self) -> str:
        """Rows, positions and size, for a person."""
        tokens = sum(self.index.shard_lengths)
        size = human_bytes(tokens * self.row_bytes)
        return (
            f"{len(self.index.keys):,} rows, {tokens:,} response tokens of {self.row_bytes:,} bytes: {size} of "
            f"{self.manifest.dtype} in {self.num_shards} shards"
        )

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    # Whether it fits, and whether it is whole.

    def check_belongs(
        self, fingerprint: dict[str, str], names: dict[str, str], sets: Mapping[str, EncodedPairs]
    ) -> None:
        """Refuse a cache that was built from something else.

        Raises:
            UserError: says what: teacher, adapter, dtype, tokenizer, template, truncation, or the row and its file.
        """
        differs = difference(self.manifest.fingerprint, fingerprint, (self.manifest.names, names))
        for role, pairs in sets.items():
            strangers = [] if differs else self.index.strangers(pairs)
            if strangers:
                differs = self._stranger(role, pairs, strangers)
        if differs:
            raise UserError(
                f"teacher cache {self.folder} does not belong here: {differs}; name a folder that does not exist "
                "yet to build another cache, or undo the change"
            )

    def _stranger(self, role: str, pairs: EncodedPairs, strangers: list[EncodedRow]) -> str:
        first = strangers[0]
        members = self.index.members.get(role)
        if members is None:
            verb = f"is not held, for it was built without the {role} set"
        elif first.example_id in members[:, 0]:
            verb = "has changed since it was built"
        else:
            verb = "was not there when it was built"
        if first.truncated:
            verb += " (the row is cut to data.max_length; another student's tokenizer may cut it elsewhere)"
        count = f"{len(strangers)} of {len(pairs)} rows" if len(strangers) > 1 else "that row alone"
        return f"row {first.example_id} (counting from 0) of {pairs.source} {verb} ({count})"

    def faults(self, rank: int = 0, world_size: int = 1, *, progress: bool = False) -> dict[str, str]:
        """What is wrong, by file: every byte of every file is read; of the shards, those of one rank."""
        identity = {"cache": self.manifest.identity}
        layout = {name: (_dtype(word), tuple(shape)) for name, (word, shape) in self.manifest.teacher.items()}
        checks: list[tuple[Path, Layout, dict[str, str]]] = [(self.folder / TEACHER, layout, identity)]
        for shard in range(rank, self.num_shards, world_size):
            shape = (self.index.shard_lengths[shard], self.hidden_size)
            checks.append((self.shard_path(shard), {"hidden": (self.dtype, shape)}, {**identity, "shard": str(shard)}))
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
            found = tqdm(
                pool.map(lambda check: fault(*check), checks),
                "verifying the teacher cache", len(checks), unit="shard", delay=2, leave=False, disable=not progress,
            )  # fmt: skip
            return {path.name: wrong for (path, _, _), wrong in zip(checks, found, strict=True) if wrong}

    def refuse(self, faults: Mapping[str, str]) -> None:
        """Raise if anything is damaged; what is only missing can be built.

        Raises:
            UserError: names the first file and what is wrong with it.
        """
        damaged = [(name, wrong) for name, wrong in faults.items() if wrong != MISSING]
        if damaged:
            name, wrong = damaged[0]
            more = f", and so are {len(damaged) - 1} others" if len(damaged) > 1 else ""
            raise UserError(
                f"{name} of teacher cache {self.folder} {wrong}{more}; run dwakd cache with the recipe to build it anew"
            )

    # Writing and reading.

    def write_teacher(self, table: Tensor, head: OutputHead) -> None:
        write_tensors(self.folder / TEACHER, _teacher_tensors(table, head), {"cache": self.manifest.identity})

    def write_shard(self, shard: int, hidden: Tensor) -> None:
        metadata = {"cache": self.manifest.identity, "shard": str(shard)}
        write_tensors(self.shard_path(shard), {"hidden": hidden}, metadata)

    def teacher(self) -> tuple[Tensor, OutputHead]:
        """The teacher's embedding table and head; where they are tied, they are one tensor."""
        tensors = read_tensors(self.folder / TEACHER)
        weight = tensors["head.weight"]
        head = OutputHead(weight, tensors.get("head.bias"), self.manifest.scale, self.manifest.soft_cap)
        return tensors.get("embedding", weight), head

    def place(self, key: bytes) -> int | None:
        """Where a row stands; None if it isn't held."""
        return self.index.places.get(key)

    def prefetch(self, places: Sequence[int]) -> None:
        """Have rows read ahead in the background."""
        for place in places:
            self._mapped(place).prefetch(int(self.index.offsets[place]), int(self.index.lengths[place]))

    def read(self, places: Sequence[int]) -> Float[Tensor, "tokens hidden"]:
        """The hidden states of some rows, one after the other."""
        lengths = self.index.lengths[list(places)].tolist()
        content = np.empty(sum(lengths) * self.row_bytes, dtype=np.uint8)
        end = 0
        for place, length in zip(places, lengths, strict=True):
            begin, end = end, end + length * self.row_bytes
            content[begin:end] = self._mapped(place).rows(int(self.index.offsets[place]), length)
        return torch.from_numpy(content).view(self.dtype).view(-1, self.hidden_size)

    def _mapped(self, place: int) -> MappedRows:
        shard = int(self.index.shards[place])
        if shard not in self._maps:
            self._maps[shard] = MappedRows(self.shard_path(shard), self.row_bytes)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        """For data-loader workers that are started afresh: maps stay behind."""
        return {**self.__dict__, "_maps": {}}

    def tidy(self) -> None:
        """Remove what killed builds have left."""
        for path in self.folder.glob(f".*{UNFINISHED}*"):
            path.unlink(missing_ok=True)


def open_whole(folder: Path, *, progress: bool = False) -> Cache:
    """Open a cache of which every byte is there and as it was written.

    Raises:
        UserError: there is none, or names every file that is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no teacher cache (no {MANIFEST}); build one with dwakd cache and a recipe")
    cache = Cache.open(folder)
    if faults := cache.faults(progress=progress):
        found = "; ".join(f"{name} {wrong}" for name, wrong in faults.items())
        raise UserError(
            f"teacher cache {folder} is not whole: {found}; run dwakd cache with the recipe to build them anew"
        )
    return cache


def _teacher_tensors(table: Tensor, head: OutputHead) -> dict[str, Tensor]:
    tensors = {"head.weight": head.weight}
    if head.bias is not None:
        tensors["head.bias"] = head.bias
    if table.data_ptr() != head.weight.data_ptr():
        tensors["embedding"] = table
    return tensors


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(word: str) -> torch.dtype:
    dtype = getattr(torch, word)
    assert isinstance(dtype, torch.dtype)
    return dtype
