"""A teacher cache: a folder with a manifest, an index, the teacher's embedding table and head, and shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from jaxtyping import Float
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.contrib.concurrent import thread_map  # type: ignore[import-untyped, unused-ignore]

from dwakd.batch import OutputHead
from dwakd.cache.fingerprint import file_digest
from dwakd.cache.manifest import DAMAGED, INDEX, MANIFEST, MISSING, TEACHER, Index, Manifest, damaged
from dwakd.data.encoded import EncodedPairs
from dwakd.errors import UserError, explained
from dwakd.folders import cache_folder, write_file

_LEAST_TOKEN_BYTES = 1 << 10  # so that a shard of narrow states has no more tokens than can be computed again


@dataclass(frozen=True)
class CacheRequest:
    """What a cache has to contain, and which process builds it."""

    sets: Mapping[str, EncodedPairs]  # "train" and, if there is one, "eval"
    fingerprint: dict[str, str]  # result of `dwakd.cache.fingerprint.fingerprint`
    names: dict[str, str]  # names of teacher, adapter and tokenizer, for messages
    dtype: torch.dtype | None = None  # dtype of the stored hidden states; None for the teacher's own
    rank: int = 0  # rank of this process
    world_size: int = 1  # number of processes that build
    progress: bool = True  # show progress bars and sizes


class Cache:
    """The teacher's final hidden states at the response tokens of some data sets.

    Rows are found by their content, so a data set can be read if the cache contains each of its rows, in any order.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder = folder
        self.manifest = manifest
        self.index = index
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self.token_bytes = manifest.hidden_size * self.dtype.itemsize
        self.num_shards = len(index.shard_lengths)
        self._slices: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Cache:
        """Open a cache, finished or not. Only the manifest and the index are read and verified."""
        manifest, path = Manifest.load(folder), folder / INDEX
        if not path.is_file():
            raise damaged(folder, INDEX, MISSING)
        if file_digest(path) != manifest.digests[INDEX]:
            raise damaged(folder, INDEX)
        return cls(folder, manifest, Index.load(path))

    @classmethod
    def create(cls, folder: Path, request: CacheRequest, table: Tensor, head: OutputHead, width: int) -> Cache:
        """Write index and manifest. Each rank may call this: all ranks write the same bytes."""
        dtype = request.dtype or head.weight.dtype
        index = Index.plan(request.sets, max(width * dtype.itemsize, _LEAST_TOKEN_BYTES))
        digests = {INDEX: _sha256(index.dump()), TEACHER: _sha256(_teacher_file(table, head))}
        outputs = width, head.scale, head.soft_cap
        manifest = Manifest(request.fingerprint, request.names, _dtype_name(dtype), *outputs, digests)
        write_file(folder / INDEX, index.dump())
        write_file(folder / MANIFEST, manifest.dump())  # a cache exists once its manifest does
        return cls(folder, manifest, index)

    def describe(self) -> str:
        """Return number of rows, number of tokens and size as text."""
        tokens = sum(self.index.shard_lengths)
        return (
            f"{len(self.index.keys):,} rows, {tokens:,} response tokens of {self.token_bytes:,} bytes: "
            f"{decimal(tokens * self.token_bytes)} of {self.manifest.dtype} in {self.num_shards} shards"
        )

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def check_source(self, request: CacheRequest) -> None:
        """Raise a UserError that names the option or the row that differs from what the cache was built from."""
        if difference := next(self._differences(request), None):
            raise UserError(
                f"teacher cache {self.folder} was built with other models, options or data: {difference}; undo the "
                "change, or name a new folder in teacher.cache"
            )

    def _differences(self, request: CacheRequest) -> Iterator[str]:
        names, stored = self.manifest.names, self.manifest.fingerprint
        for field, value in request.fingerprint.items():
            if stored.get(field) == value:
                continue
            if field not in names:
                yield f"{field} is {stored.get(field)!r} in the cache and {value!r} here"
            elif (old := names[field]) == (new := request.names[field]):
                yield f"the content of the {field} {new} has changed since the cache was built"
            else:
                yield f"the {field} is {old} in the cache and {new} here, and their contents differ"
        if request.dtype not in (None, self.dtype):
            yield f"teacher.cache_dtype is {self.manifest.dtype!r} in the cache and {_dtype_name(request.dtype)!r} here"
        for role, pairs in request.sets.items():
            rows = self.index.unmatched(pairs)
            for row in rows[:1]:
                known = self.index.members.get(role)
                problem = "has changed since" if known is not None and row.example_id in known else "did not exist when"
                problem += " the cache was built" + (f" without the {role} set" if known is None else "")
                if row.truncated:
                    problem += " (the row is cut to data.max_length; another student's tokenizer may cut it elsewhere)"
                count = f"{len(rows)} of {len(pairs)} rows differ" if len(rows) > 1 else "only this row differs"
                yield f"{row.place} of {pairs.source} {problem} ({count})"

    def problems(self, rank: int = 0, world_size: int = 1, *, progress: bool = False) -> dict[str, str]:
        """Read every byte of the teacher file and of one rank's shards; return what is wrong by file name."""
        files = {TEACHER: -1} | {self.shard_path(s).name: s for s in range(rank, self.num_shards, world_size)}
        bar = {"desc": "verifying the teacher cache", "unit": "shard", "delay": 2, "leave": False}
        found = thread_map(self._problem, files, files.values(), disable=not progress, **bar)  # hashing uses all cores
        return {name: problem for name, problem in zip(files, found, strict=True) if problem}

    def _problem(self, name: str, shard: int) -> str | None:
        path = self.folder / name
        if not path.is_file():
            return MISSING
        if name == TEACHER:
            intact = file_digest(path) == self.manifest.digests[TEACHER]
        else:
            try:
                with safe_open(path, "pt") as file:
                    hidden, metadata = file.get_tensor("hidden"), file.metadata()
            except SafetensorError:
                return DAMAGED
            shape = (self.index.shard_lengths[shard], self.manifest.hidden_size)
            intact = hidden.shape == shape and metadata == self._metadata(shard, hidden)
        return None if intact else DAMAGED

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
        """Write the teacher's embedding table and head again; raise a UserError if they have changed."""
        data = _teacher_file(table, head)
        if _sha256(data) != self.manifest.digests[TEACHER]:
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
    """Open a cache and verify every byte; raise a UserError that names the files that are missing or damaged."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a teacher cache (no {MANIFEST}); build one with dwakd cache and a recipe")
    cache = Cache.open(folder)
    cache.refuse_damaged(cache.problems(progress=progress), missing=True)
    return cache


def local_folder(address: str | Path) -> Path:
    """Return the folder of a cache. One at an fsspec URL, such as s3://bucket/cache, is copied to `cache_folder()` first.

    The copy is named after the address and cache.json, and files that it has already are not copied again.
    """
    if "://" not in str(address):
        return Path(address).expanduser()
    with explained(f"teacher cache {address} cannot be read; build it in a folder and copy that to this address"):
        files, root = url_to_fs(str(address))
        manifest = files.cat_file(f"{root}/{MANIFEST}")
        folder = cache_folder() / "remote" / hashlib.sha256(str(address).encode() + manifest).hexdigest()[:32]
        for entry in sorted(files.ls(root, detail=True), key=lambda one: Path(one["name"]).name == MANIFEST):
            path = folder / Path(entry["name"]).name
            if not path.name.startswith(".") and not path.is_file():
                write_file(path, files.cat_file(entry["name"]))
    return folder


def _teacher_file(table: Tensor, head: OutputHead) -> bytes:
    tied = table.data_ptr() == head.weight.data_ptr()
    tensors = {"head.weight": head.weight, "head.bias": head.bias, "embedding": None if tied else table}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None})


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
