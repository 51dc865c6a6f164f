"""The command line, `dwakd`: one module for each kind of command."""

from dwakd.cli import training, results, tools  # isort: skip  # --help lists the commands in this order
from dwakd.cli.app import app, main

__all__ = ["app", "main", "results", "tools", "training"]
