"""A teacher cache: a folder with a manifest, an index, the teacher's embedding table and head, and shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.batch import OutputHead
from dwakd.cache.files import write_file
from dwakd.cache.fingerprint import difference, file_digest
from dwakd.cache.index import Index
from dwakd.cache.manifest import DAMAGED, INDEX, MANIFEST, TEACHER, Manifest, damaged
from dwakd.data.pairs import EncodedPairs
from dwakd.errors import UserError

MISSING = "is missing"


@dataclass(frozen=True)
class CacheRequest:
    """What a cache has to contain, and which process builds it.

    Args:
        sets: "train" and, if there is one, "eval".
        fingerprint: result of `dwakd.cache.fingerprint.fingerprint`.
        names: names of teacher, adapter and tokenizer for messages.
        dtype: dtype to store; None for the teacher's own.
        rank: rank of this process.
        world_size: number of processes that build.
        progress: show progress bars and sizes.
    """

    sets: Mapping[str, EncodedPairs]
    fingerprint: dict[str, str]
    names: dict[str, str]
    dtype: torch.dtype | None = None
    rank: int = 0
    world_size: int = 1
    progress: bool = True


class Cache:
    """The teacher's final hidden states at the response tokens of some data sets.

    Rows are found by their content, so a data set can be read if the cache contains each of its rows, in any order.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder = folder
        self.manifest = manifest
        self.index = index
        self._slices: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Cache:
        """Open a cache, finished or not. Only the manifest and the index are read and verified.

        Raises:
            UserError: the manifest or the index is damaged.
        """
        manifest = Manifest.load(folder)
        try:
            data = (folder / INDEX).read_bytes()
        except FileNotFoundError as error:
            raise damaged(folder, INDEX, MISSING) from error
        if hashlib.sha256(data).hexdigest() != manifest.digests[INDEX]:
            raise damaged(folder, INDEX)
        return cls(folder, manifest, Index.from_tensors(load(data)))

    @classmethod
    def create(cls, folder: Path, request: CacheRequest, table: Tensor, head: OutputHead) -> Cache:
        """Write every file except the shards. Each rank may call this: all ranks write the same bytes."""
        dtype = request.dtype or head.weight.dtype
        index = Index.plan(request.sets, head.hidden_size * dtype.itemsize)
        files = {INDEX: save(index.tensors()), TEACHER: _teacher_file(table, head)}
        manifest = Manifest(
            fingerprint=request.fingerprint,
            names=request.names,
            dtype=str(dtype).removeprefix("torch."),
            hidden_size=head.hidden_size,
            scale=head.scale,
            soft_cap=head.soft_cap,
            digests={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {**files, MANIFEST: manifest.dump()}.items():  # a cache exists once its manifest does
            write_file(folder / name, data)
        return cls(folder, manifest, index)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored hidden states."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    @property
    def num_shards(self) -> int:
        return len(self.index.shard_lengths)

    @property
    def token_bytes(self) -> int:
        """Bytes of one hidden state."""
        return self.manifest.hidden_size * self.dtype.itemsize

    def describe(self) -> str:
        """Return number of rows, number of tokens and size as text."""
        tokens = sum(self.index.shard_lengths)
        return (
            f"{len(self.index.keys):,} rows, {tokens:,} response tokens of {self.token_bytes:,} bytes: "
            f"{human_bytes(tokens * self.token_bytes)} of {self.manifest.dtype} in {self.num_shards} shards"
        )

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def check_source(self, request: CacheRequest) -> None:
        """Raise a UserError that names the option or the row that differs from what the cache was built from."""
        differs = difference(self.manifest.fingerprint, request.fingerprint, self.manifest.names, request.names)
        if request.dtype not in (None, self.dtype):
            stored = str(request.dtype).removeprefix("torch.")
            differs = differs or f"teacher.cache_dtype is {self.manifest.dtype!r} in the cache and {stored!r} here"
        for role, pairs in request.sets.items():
            differs = differs or self._unmatched(role, pairs)
        if differs:
            raise UserError(
                f"teacher cache {self.folder} was built from something else: {differs}; undo the change, or name a new "
                "folder in teacher.cache"
            )

    def _unmatched(self, role: str, pairs: EncodedPairs) -> str | None:
        """Describe the first row of a data set that the cache does not contain."""
        rows = self.index.unmatched(pairs)
        if not rows:
            return None
        first, known = rows[0], self.index.members.get(role)
        problem = "has changed since" if known is not None and first.example_id in known else "did not exist when"
        problem += " the cache was built" + (f" without the {role} set" if known is None else "")
        if first.truncated:
            problem += " (the row is cut to data.max_length; another student's tokenizer may cut it elsewhere)"
        count = f"{len(rows)} of {len(pairs)} rows differ" if len(rows) > 1 else "only this row differs"
        return f"row {first.example_id} (counting from 0) of {pairs.source} {problem} ({count})"

    def problems(self, rank: int = 0, world_size: int = 1, *, progress: bool = False) -> dict[str, str]:
        """Read every byte of the teacher file and of one rank's shards; return what is wrong by file name."""
        files = {TEACHER: -1} | {self.shard_path(s).name: s for s in range(rank, self.num_shards, world_size)}
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            found = tqdm(
                pool.map(self._problem, files, files.values()),
                "verifying the teacher cache", len(files), unit="shard", delay=2, leave=False, disable=not progress,
            )  # fmt: skip
            return {name: problem for name, problem in zip(files, found, strict=True) if problem}

    def _problem(self, name: str, shard: int) -> str | None:
        path = self.folder / name
        if not path.is_file():
            return MISSING
        if name == TEACHER:
            return None if file_digest(path) == self.manifest.digests[TEACHER] else DAMAGED
        try:
            with safe_open(path, "pt") as file:
                hidden, metadata = file.get_tensor("hidden"), file.metadata()
        except SafetensorError:
            return DAMAGED
        shape = (self.index.shard_lengths[shard], self.manifest.hidden_size)
        return None if hidden.shape == shape and metadata == self._metadata(shard, hidden) else DAMAGED

    def _metadata(self, shard: int, hidden: Tensor) -> dict[str, str]:
        """Return the metadata of a shard: a SHA-256 of the cache's identity, the shard's number and its content."""
        digest = hashlib.sha256(f"{self.manifest.identity} {shard} {hidden.dtype} {list(hidden.shape)} ".encode())
        digest.update(hidden.view(torch.uint8).numpy().data)
        return {"sha256": digest.hexdigest()}

    def refuse_damaged(self, problems: Mapping[str, str], *, missing: bool = False) -> None:
        """Raise a UserError that names the files that are damaged or, with `missing`, absent."""
        found = [f"{name} {problem}" for name, problem in problems.items() if missing or problem != MISSING]
        if found:
            more = f"; and {len(found) - 3} more files" if len(found) > 3 else ""
            raise UserError(
                f"teacher cache {self.folder} cannot be used: {'; '.join(found[:3])}{more}; run dwakd cache with the "
                "recipe to build these files again"
            )

    def write_teacher(self, table: Tensor, head: OutputHead) -> None:
        """Write the teacher's embedding table and head again.

        Raises:
            UserError: they are not the tensors that the cache was built with.
        """
        data = _teacher_file(table, head)
        if hashlib.sha256(data).hexdigest() != self.manifest.digests[TEACHER]:
            raise damaged(self.folder, TEACHER, "is damaged, and the teacher's head or embeddings have changed")
        write_file(self.folder / TEACHER, data)

    def write_shard(self, shard: int, hidden: Tensor) -> None:
        """Write the hidden states of one shard with their checksum."""
        write_file(self.shard_path(shard), save({"hidden": hidden}, self._metadata(shard, hidden)))

    def teacher(self) -> tuple[Tensor, OutputHead]:
        """Load the teacher's embedding table and head. If they are tied, they are one tensor."""
        tensors = {name: tensor.clone() for name, tensor in load_file(self.folder / TEACHER).items()}
        weight = tensors["head.weight"]
        head = OutputHead(weight, tensors.get("head.bias"), self.manifest.scale, self.manifest.soft_cap)
        return tensors.get("embedding", weight), head

    def read(self, places: Sequence[int]) -> Float[Tensor, "tokens hidden"]:
        """Copy the hidden states of some rows, given by their indices, into one tensor."""
        parts = []
        for place in places:
            shard, start = int(self.index.shards[place]), int(self.index.offsets[place])
            if shard not in self._slices:
                self._slices[shard] = safe_open(self.shard_path(shard), "pt").get_slice("hidden")  # type: ignore[no-untyped-call, unused-ignore]
            parts.append(self._slices[shard][start : start + int(self.index.lengths[place])])
        return torch.cat(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude open files when the cache is pickled for a data-loader worker."""
        return {**self.__dict__, "_slices": {}}


def open_complete(folder: Path, *, progress: bool = False) -> Cache:
    """Open a cache and verify every byte of every file.

    Raises:
        UserError: the folder contains no cache, or names the files that are missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a teacher cache (no {MANIFEST}); build one with dwakd cache and a recipe")
    cache = Cache.open(folder)
    cache.refuse_damaged(cache.problems(progress=progress), missing=True)
    return cache


def human_bytes(count: float) -> str:
    """Format a number of bytes with a suitable unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _teacher_file(table: Tensor, head: OutputHead) -> bytes:
    tensors = {"head.weight": head.weight}
    if head.bias is not None:
        tensors["head.bias"] = head.bias
    if table.data_ptr() != head.weight.data_ptr():
        tensors["embedding"] = table
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
