"""Where files are kept that can be made again."""

import os
from pathlib import Path

CACHE_VARIABLE = "DWAKD_CACHE"


def cache_folder() -> Path:
    """`$DWAKD_CACHE`, else `~/.cache/dwakd`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dwakd").expanduser()
