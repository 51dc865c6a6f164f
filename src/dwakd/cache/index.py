"""The index of a cache: which rows it contains and where. It is computed before the first shard is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwakd.cache.fingerprint import row_key
from dwakd.data.pairs import EncodedPairs, EncodedRow, EncodedSide

SHARD_BYTES = 64 << 20
MIN_SHARDS = 16
"""Small caches are split as well, so that ranks can share the work and a killed build loses little of it."""


def teacher_side(row: EncodedRow) -> EncodedSide:
    """Return the teacher's side of a row. Rows that are cached always have one."""
    assert row.teacher is not None
    return row.teacher


def side_key(side: EncodedSide) -> bytes:
    """Compute `row_key` of an encoded side."""
    return row_key(side.ids, side.num_prompt)


@dataclass(frozen=True)
class Index:
    """Rows in the order in which they are stored. Equal rows are stored once.

    Args:
        keys: `row_key` of each row.
        lengths: number of response tokens of each row.
        shards: shard of each row.
        offsets: first position of each row within its shard.
        members: per data set ("train", "eval"), the indices of its rows in their source.
    """

    keys: list[bytes]
    lengths: NDArray[np.int64]
    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    members: dict[str, NDArray[np.int64]]

    @classmethod
    def plan(cls, sets: Mapping[str, EncodedPairs], token_bytes: int) -> Index:
        """Assign rows to shards of similar size. The result depends on the data only, not on the number of processes.

        Args:
            sets: data sets to cache.
            token_bytes: bytes of one hidden state.
        """
        places: dict[bytes, int] = {}
        lengths: list[int] = []
        members = {}
        for name, pairs in sets.items():
            members[name] = np.array([row.example_id for row in pairs.rows], dtype=np.int64)
            for side in map(teacher_side, pairs.rows):
                if places.setdefault(side_key(side), len(places)) == len(lengths):
                    lengths.append(len(side.byte_ends))
        counts = np.array(lengths, dtype=np.int64)
        ends = np.cumsum(counts)
        size = max(min(SHARD_BYTES // token_bytes, int(ends[-1]) // MIN_SHARDS), 1)
        shards = np.unique((ends - 1) // size, return_inverse=True)[1].astype(np.int64)  # no shard is empty
        firsts = (ends - counts)[np.searchsorted(shards, np.arange(shards[-1] + 1))]
        return cls(list(places), counts, shards, ends - counts - firsts[shards], members)

    @cached_property
    def places(self) -> dict[bytes, int]:
        """Index of each row by its key."""
        return {key: place for place, key in enumerate(self.keys)}

    @cached_property
    def shard_lengths(self) -> list[int]:
        """Number of positions in each shard."""
        return np.bincount(self.shards, weights=self.lengths).astype(int).tolist()

    def rows_of(self, shard: int) -> list[int]:
        """Return the indices of the rows in a shard."""
        return np.flatnonzero(self.shards == shard).tolist()

    def unmatched(self, pairs: EncodedPairs) -> list[EncodedRow]:
        """Return the rows of a data set that the index does not contain."""
        return [row for row in pairs.rows if side_key(teacher_side(row)) not in self.places]

    def tensors(self) -> dict[str, Tensor]:
        """Return the content of index.safetensors, which `from_tensors` reads."""
        keys = np.frombuffer(b"".join(self.keys), dtype=np.uint8).reshape(len(self.keys), -1).copy()
        arrays = {"keys": keys, "lengths": self.lengths, "shards": self.shards, "offsets": self.offsets, **self.members}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Index:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        keys = [row.tobytes() for row in arrays.pop("keys")]
        return cls(keys, arrays.pop("lengths"), arrays.pop("shards"), arrays.pop("offsets"), arrays)
