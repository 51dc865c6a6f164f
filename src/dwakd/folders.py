"""The folder of reusable files, a check of output folders before anything runs for hours, and atomic writing."""

import contextlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dwakd.errors import UserError

CACHE_VARIABLE = "DWAKD_CACHE"
LOCK_FILE = ".lock"
UNFINISHED = ".tmp-"
"""Part of the name of a file that `write_file` has not finished."""


def cache_folder() -> Path:
    """Return the folder of files that can be created again: `$DWAKD_CACHE`, or `~/.cache/dwakd`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dwakd").expanduser()


def check_output_folder(folder: Path, *, empty: bool = False) -> None:
    """Check that files can be written into a folder, which need not exist yet.

    Raises:
        UserError: the folder cannot be created or written, the path or a parent is a file or a broken link, or `empty` is
            set and the folder is not empty; the message names --output.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, so {folder} cannot be the output folder; choose another with --output")
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to a folder that does not exist; create it, or choose another with --output"
            )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written ({existing}: {reason}); choose another with --output") from error
    if empty and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output folder {folder} is not empty; choose another with --output")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Create an output folder and lock it against other processes inside a `with` block.

    Raises:
        UserError: another process has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is writing to {folder}: wait for it, or choose another --output") from None
    try:
        yield
    finally:
        # deleted before the release: a process that has opened the file in the meantime detects that it was deleted
        with contextlib.suppress(PermissionError):  # Windows deletes no open file
            (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()


def write_file(path: Path, data: bytes) -> None:
    """Write a temporary file, flush it to disk and rename it to `path`, which therefore appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{UNFINISHED}{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except FileNotFoundError:  # another process finished the same file and removed temporary files
            if not path.is_file():
                raise
    except OSError as error:
        error.filename = error.filename or str(path)  # for the message if the disk is full
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON by `write_file`."""
    write_file(path, f"{json.dumps(content, indent=2)}\n".encode())


def without_paths(content: Any) -> Any:
    """Return nested values in which each absolute path is replaced by its last part; a text with { is a template."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    if not isinstance(content, str):
        return content
    prefix = "gguf:" if content.startswith("gguf:") else ""
    path = Path(content.removeprefix(prefix))
    is_path = path.name and (path.is_absolute() or path.parts[0].startswith("~")) and not re.search(r"[\n{]", content)
    return prefix + path.name if is_path else content
