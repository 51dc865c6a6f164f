"""Write files that appear complete or not at all."""

import os
from pathlib import Path

UNFINISHED = ".tmp-"


def write_file(path: Path, data: bytes) -> None:
    """Write a temporary file next to `path`, flush it to disk, then rename it to `path`.

    Raises:
        OSError: the file cannot be written; a previous file at `path` is unchanged and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except FileNotFoundError:  # another process finished the same cache and removed temporary files
            if not path.is_file():
                raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for path in folder.glob(f".*{UNFINISHED}*"):
        path.unlink(missing_ok=True)
