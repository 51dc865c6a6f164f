"""Which rows a cache holds, and where: its plan, made before the first shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Small caches are cut, too: what an interrupted build loses, and what ranks have to share."""


def teacher_side(row: EncodedRow) -> EncodedSide:
    """The teacher's tokens of a row, which a cache needs."""
    assert row.teacher is not None
    return row.teacher


def side_key(side: EncodedSide) -> bytes:
    """`row_key` of a side."""
    return row_key(side.ids, side.num_prompt)


@dataclass(frozen=True)
class Index:
    """Rows in the order in which they are stored; equal rows are stored once.

    Args:
        keys: of each row.
        lengths: response positions of each row.
        shards: the shard of each row.
        offsets: the first position of each row within its shard.
        members: per set ("train", "eval") its rows' indices in their source and here, (rows, 2).
    """

    keys: list[bytes]
    lengths: NDArray[np.int64]
    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    members: dict[str, NDArray[np.int64]]

    @classmethod
    def plan(cls, sets: Mapping[str, EncodedPairs], row_bytes: int) -> Index:
        """Shards of like size, as many as it takes; they depend on the data alone, not on the number of processes.

        Args:
            sets: what is to be cached.
            row_bytes: of one position.
        """
        places: dict[bytes, int] = {}
        lengths: list[int] = []
        members = {}
        for name, pairs in sets.items():
            entries = []
            for row in pairs.rows:
                side = teacher_side(row)
                place = places.setdefault(side_key(side), len(places))
                if place == len(lengths):
                    lengths.append(len(side.byte_ends))
                entries.append((row.example_id, place))
            members[name] = np.array(entries, dtype=np.int64).reshape(-1, 2)
        counts = np.array(lengths, dtype=np.int64)
        ends = np.cumsum(counts)
        size = max(min(SHARD_BYTES // row_bytes, int(ends[-1]) // MIN_SHARDS), 1)
        shards = np.unique((ends - 1) // size, return_inverse=True)[1].astype(np.int64)  # none is empty
        firsts = (ends - counts)[np.searchsorted(shards, np.arange(shards[-1] + 1))]
        return cls(list(places), counts, shards, ends - counts - firsts[shards], members)

    @cached_property
    def places(self) -> dict[bytes, int]:
        """Where each row stands, by its key."""
        return {key: place for place, key in enumerate(self.keys)}

    @cached_property
    def shard_lengths(self) -> list[int]:
        """Positions in each shard."""
        return np.bincount(self.shards, weights=self.lengths).astype(int).tolist()

    def rows_of(self, shard: int) -> Sequence[int]:
        """The rows of a shard."""
        return np.flatnonzero(self.shards == shard).tolist()

    def strangers(self, pairs: EncodedPairs) -> list[EncodedRow]:
        """The rows of a set that are not here."""
        return [row for row in pairs.rows if side_key(teacher_side(row)) not in self.places]

    def tensors(self) -> dict[str, Tensor]:
        """For writing; `from_tensors` undoes it."""
        keys = np.frombuffer(b"".join(self.keys), dtype=np.uint8).reshape(len(self.keys), -1)
        parts = {"lengths": self.lengths, "shards": self.shards, "offsets": self.offsets, **self.members}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
        return {"keys": torch.from_numpy(keys.copy()), **tensors}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Index:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        keys = [row.tobytes() for row in arrays.pop("keys")]
        lengths, shards, offsets = (arrays.pop(name) for name in ("lengths", "shards", "offsets"))
        return cls(keys, lengths, shards, offsets, arrays)
