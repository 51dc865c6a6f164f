"""What a cache says of itself: cache.json, and the messages that send a user back to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dwakd.errors import UserError

MANIFEST, INDEX, TEACHER = "cache.json", "index.safetensors", "teacher.safetensors"
FORMAT = "dwakd teacher cache 2"
_OWN = (MANIFEST, INDEX, TEACHER, "shard-")


@dataclass(frozen=True)
class Manifest:
    """What cache.json says.

    Args:
        fingerprint: see `dwakd.cache.fingerprint.fingerprint`.
        names: what teacher, adapter and tokenizer were called; only for messages.
        dtype: of the stored hidden states.
        index: checksum of the index, its header included.
        teacher: dtype and shape of each tensor in teacher.safetensors.
        scale: of the head.
        soft_cap: of the head.
    """

    fingerprint: dict[str, str]
    names: dict[str, str]
    dtype: str
    index: str
    teacher: dict[str, tuple[str, list[int]]]
    scale: float
    soft_cap: float | None

    @property
    def identity(self) -> str:
        """Digest of everything but the names; stands in every file of the cache."""
        content = {name: value for name, value in asdict(self).items() if name != "names"}
        return hashlib.sha256(json.dumps([FORMAT, content], sort_keys=True).encode()).hexdigest()

    def dump(self) -> str:
        body = {"format": FORMAT, "identity": self.identity, **asdict(self)}
        return json.dumps(body, indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        try:
            body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            form, identity = body.pop("format"), body.pop("identity")
            manifest = cls(**{**body, "teacher": {name: tuple(entry) for name, entry in body["teacher"].items()}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken(folder, MANIFEST, "is damaged (it cannot be read)") from error
        if form != FORMAT:
            raise UserError(
                f"teacher cache {folder} has the format {form!r}, and this version of dwakd reads {FORMAT!r}: delete "
                "the folder, or name another in teacher.cache"
            )
        if identity != manifest.identity:
            raise broken(folder, MANIFEST, "is damaged (its content does not match its checksum)")
        return manifest


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else, or that is none.

    Raises:
        UserError: names the folder.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, so {folder} cannot be a teacher cache; correct teacher.cache")
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.name.removeprefix(".").startswith(_OWN):
            raise UserError(
                f"{folder} is not empty and no teacher cache (it holds {path.name} and no {MANIFEST}); name another "
                "folder in teacher.cache"
            )


def human_bytes(count: float) -> str:
    """A size in the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def broken(folder: Path, name: str, wrong: str) -> UserError:
    return UserError(
        f"{name} of teacher cache {folder} {wrong}; delete {MANIFEST} and run dwakd cache with the recipe again: "
        "finished shards are kept"
    )
