"""The manifest cache.json: what a cache was built from, and the checksums of its index and its teacher file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dwakd.errors import UserError

MANIFEST, INDEX, TEACHER = "cache.json", "index.safetensors", "teacher.safetensors"
FORMAT = "dwakd teacher cache 3"
DAMAGED = "does not match its checksum: it is damaged, cut short, or belongs to another cache"


@dataclass(frozen=True)
class Manifest:
    """Content of cache.json.

    Args:
        fingerprint: result of `dwakd.cache.fingerprint.fingerprint`.
        names: names of teacher, adapter and tokenizer; used in messages only.
        dtype: dtype of the stored hidden states, for example "float32".
        hidden_size: size of one hidden state.
        scale: `OutputHead.scale` of the teacher.
        soft_cap: `OutputHead.soft_cap` of the teacher.
        digests: SHA-256 of index.safetensors and of teacher.safetensors.
    """

    fingerprint: dict[str, str]
    names: dict[str, str]
    dtype: str
    hidden_size: int
    scale: float
    soft_cap: float | None
    digests: dict[str, str]

    @property
    def identity(self) -> str:
        """Digest of every field except the names. The checksum of each shard includes it."""
        return _digest({name: value for name, value in asdict(self).items() if name != "names"})

    def dump(self) -> bytes:
        """Return the content of cache.json, which ends with its own checksum."""
        body = {"format": FORMAT, **asdict(self), "sha256": _digest(asdict(self))}
        return f"{json.dumps(body, indent=2)}\n".encode()

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and verify cache.json.

        Raises:
            UserError: the file is damaged, or the cache has another format.
        """
        data = (folder / MANIFEST).read_bytes()
        try:
            body = json.loads(data)
            found = body["format"]
            manifest = cls(**{item.name: body[item.name] for item in fields(cls)}) if found == FORMAT else None
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(folder, MANIFEST) from error
        if manifest is None:
            raise UserError(
                f"{MANIFEST} of teacher cache {folder} has the format {found!r}, but this version of dwakd reads "
                f"{FORMAT!r}; delete the folder, or name another folder in teacher.cache"
            )
        if manifest.dump() != data:
            raise damaged(folder, MANIFEST)
        return manifest


def check_folder(folder: Path) -> None:
    """Refuse a path that is not a folder, or a folder that contains anything but a cache.

    Raises:
        UserError: names the folder.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, so {folder} cannot be a teacher cache; correct teacher.cache")
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return
    for path in folder.iterdir():
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


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, content], sort_keys=True).encode()).hexdigest()
