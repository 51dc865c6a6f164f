"""Output folders, checked before anything runs for hours."""

import tempfile
from pathlib import Path

from dwakd.errors import UserError


def check_output_folder(folder: Path, *, empty: bool = False) -> None:
    """Refuse a folder that cannot be made or written, or that is or lies under a file; with `empty` also a filled one.

    Raises:
        UserError: as said; names --output.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, so {folder} cannot be the output folder; choose another with --output")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written ({there}: {reason}); choose another with --output") from error
    if empty and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output folder {folder} is not empty; choose another with --output")
