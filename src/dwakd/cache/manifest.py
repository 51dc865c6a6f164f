"""What is written before the first shard: cache.json (what the cache was built from) and the index of its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from dwakd.cache.fingerprint import json_digest, row_key
from dwakd.data.encoded import EncodedPairs, EncodedRow, EncodedSide
from dwakd.errors import UserError

MANIFEST, INDEX, TEACHER = "cache.json", "index.safetensors", "teacher.safetensors"
FORMAT = "dwakd teacher cache 3"
MISSING = "is missing"
DAMAGED = "does not match its checksum: it is damaged, cut short, or belongs to another cache"
SHARD_BYTES, MIN_SHARDS = 64 << 20, 16  # several shards let ranks share the work, and a killed build loses little
_ARRAYS = ("keys", "lengths", "shards", "offsets")


@dataclass(frozen=True)
class Manifest:
    """Content of cache.json."""

    fingerprint: dict[str, str]  # result of `dwakd.cache.fingerprint.fingerprint`
    names: dict[str, str]  # names of teacher, adapter and tokenizer; used in messages only
    dtype: str  # dtype of the stored hidden states, for example "float32"
    hidden_size: int
    scale: float  # scale of the teacher's head, as in `OutputHead`
    soft_cap: float | None
    digests: dict[str, str]  # SHA-256 of index.safetensors and teacher.safetensors

    @property
    def identity(self) -> str:
        """Digest of every field except the names. The checksum of each shard includes it."""
        return json_digest([FORMAT, {name: value for name, value in asdict(self).items() if name != "names"}])

    def dump(self) -> bytes:
        """Return the content of cache.json, which ends with its own checksum."""
        body = {"format": FORMAT, **asdict(self), "sha256": json_digest([FORMAT, asdict(self)])}
        return f"{json.dumps(body, indent=2)}\n".encode()

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read cache.json; raise a UserError if it is damaged or of another format."""
        data = (folder / MANIFEST).read_bytes()
        try:
            body = json.loads(data)
            found, _ = body.pop("format"), body.pop("sha256", None)
            manifest = cls(**body) if found == FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(folder, MANIFEST) from error
        if manifest is None:
            raise UserError(
                f"{MANIFEST} of teacher cache {folder} has the format {found!r}, but this version of dwakd reads "
                f"{FORMAT!r}; delete the folder, or name another folder in teacher.cache"
            )
        if manifest.dump() != data:
            raise damaged(folder, MANIFEST)
        return manifest


@dataclass(frozen=True)
class Index:
    """Which rows a cache contains, in the order in which they are stored. Equal rows are stored once."""

    keys: NDArray[np.uint8]  # bytes of the `row_key` of each row, (rows, 16)
    lengths: NDArray[np.int64]  # number of response tokens of each row
    shards: NDArray[np.int64]  # shard of each row
    offsets: NDArray[np.int64]  # first position of each row within its shard
    members: dict[str, NDArray[np.int64]]  # per data set ("train", "eval"), the indices of its rows in their source

    @classmethod
    def plan(cls, sets: Mapping[str, EncodedPairs], token_bytes: int) -> Index:
        """Assign rows to shards of similar size, independently of the number of processes."""
        sides = dict(keyed_sides(*sets.values()))
        lengths = np.array([len(side.byte_ends) for side in sides.values()], dtype=np.int64)
        ends = np.cumsum(lengths)
        size = max(min(SHARD_BYTES // token_bytes, int(ends[-1]) // MIN_SHARDS), 1)
        shards = np.unique((ends - 1) // size, return_inverse=True)[1].astype(np.int64)  # no shard is empty
        starts = ends - lengths
        offsets = starts - starts[np.searchsorted(shards, shards)]
        keys = np.array([np.frombuffer(key, dtype=np.uint8) for key in sides])
        members = {name: np.array([row.example_id for row in pairs.rows], dtype=int) for name, pairs in sets.items()}
        return cls(keys, lengths, shards, offsets, members)

    @cached_property
    def places(self) -> dict[bytes, int]:
        """Index of each row by its key."""
        return {key.tobytes(): place for place, key in enumerate(self.keys)}

    @cached_property
    def shard_lengths(self) -> list[int]:
        """Number of positions in each shard."""
        return np.bincount(self.shards, weights=self.lengths).astype(int).tolist()

    def rows_of(self, shard: int) -> list[int]:
        """Return the indices of the rows in a shard."""
        return np.flatnonzero(self.shards == shard).tolist()

    def unmatched(self, pairs: EncodedPairs) -> list[EncodedRow]:
        """Return the rows of a data set that the index does not contain."""
        keyed = zip(pairs.rows, keyed_sides(pairs), strict=True)
        return [row for row, (key, _) in keyed if key not in self.places]

    def dump(self) -> bytes:
        """Return the content of index.safetensors."""
        return save({**{name: getattr(self, name) for name in _ARRAYS}, **self.members})

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read index.safetensors."""
        arrays = load_file(path)
        return cls(**{name: arrays.pop(name) for name in _ARRAYS}, members=arrays)


def keyed_sides(*sets: EncodedPairs) -> list[tuple[bytes, EncodedSide]]:
    """Return the teacher's side of each row with its `row_key`."""
    sides = [row.teachers[0] for pairs in sets for row in pairs.rows]
    return [(row_key(side.ids, side.num_prompt), side) for side in sides]


def check_folder(folder: Path) -> None:
    """Raise a UserError for a path that is not a folder, or for a folder that contains anything but a cache."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, so {folder} cannot be a teacher cache; correct teacher.cache")
    is_other = folder.is_dir() and not (folder / MANIFEST).is_file()
    for path in folder.iterdir() if is_other else ():
        if not path.name.removeprefix(".").startswith((MANIFEST, INDEX, TEACHER, "shard-")):
            raise UserError(
                f"{folder} is not empty and not a teacher cache (it contains {path.name} but no {MANIFEST}); name "
                "another folder in teacher.cache"
            )


def damaged(folder: Path, name: str, problem: str = DAMAGED) -> UserError:
    """Return the error for a damaged manifest or index, without which no other file can be verified."""
    return UserError(
        f"{name} of teacher cache {folder} {problem}; delete {MANIFEST} and run dwakd cache with the recipe again: "
        "finished shards are kept"
    )
