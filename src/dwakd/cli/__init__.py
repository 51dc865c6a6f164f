"""The command line: `dwakd train | cache | generate | compare | eval | similarity | inspect | shrink | demo | ... `."""

from dwakd.cli import training, results, tools  # isort: skip  # --help lists the commands in this order
from dwakd.cli.app import app, main

__all__ = ["app", "main", "results", "tools", "training"]
