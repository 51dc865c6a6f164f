"""A file with the checksums of the other files in a folder, written last: it shows that they are complete and unchanged."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import xxhash

from dwakd.folders import write_json

CHECKSUMS = "checksums.json"
_FORMAT = "dwakd checksums 1, XXH3 of 128 bits"


def begin_checksums(folder: Path) -> None:
    """Mark a folder as incomplete before its files are written."""
    write_json(folder / CHECKSUMS, {"format": _FORMAT, "files": None})


def write_checksums(folder: Path, paths: Iterable[Path] | None = None) -> None:
    """Flush files to disk and write their checksums; `paths` are by default all files in the folder and below it."""
    files = sorted(folder.rglob("*") if paths is None else paths)
    files = [path for path in files if path.is_file() and path.name != CHECKSUMS]
    with ThreadPoolExecutor() as pool:  # hashing and flushing release the interpreter lock
        digests = list(pool.map(_flushed_digest, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    write_json(folder / CHECKSUMS, {"format": _FORMAT, "files": dict(zip(names, digests, strict=True))})


def has_checksums(folder: Path) -> bool:
    """Return whether the checksums of a folder are written, without reading its files."""
    try:
        return bool(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def checksum_fault(folder: Path) -> str | None:
    """Read every file and return why the folder is incomplete or damaged; None if each checksum agrees."""
    try:
        content = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {folder / name: str(digest) for name, digest in (content["files"] or {}).items()}
        if content["format"] != _FORMAT:
            return f"its {CHECKSUMS} is of another version of dwakd, or damaged"
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"its {CHECKSUMS} is damaged"
    if not expected:
        return "it was not saved completely"
    missing = [path for path in expected if not path.is_file()]
    with ThreadPoolExecutor() as pool:
        damaged = missing or [
            p for p, found in zip(expected, pool.map(_digest, expected), strict=True) if found != expected[p]
        ]
    if not damaged:
        return None
    return f"its {damaged[0].relative_to(folder)} {'is missing' if missing else 'is damaged (its checksum differs)'}"


@cache
def code_digest() -> str:
    """Return a digest of the code that encodes rows and matches vocabularies, whose stored results depend on it."""
    package = Path(__file__).parent
    files = sorted(path for name in ("align", "data") for path in (package / name).glob("*.py"))
    return hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _flushed_digest(path: Path) -> str:
    with path.open("r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())
    return _digest(path)
