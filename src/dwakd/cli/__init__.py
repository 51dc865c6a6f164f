"""The command line: `dwakd train | cache | generate | compare | eval | similarity | shrink | demo | methods | schema | env`."""

from dwakd.cli import training, results, tools  # isort: skip  # --help lists the commands in this order
from dwakd.cli.app import app, main

__all__ = ["app", "main", "results", "tools", "training"]
