"""The application of the command line, to which the modules of this package add their commands."""

from __future__ import annotations

import errno
import io
import logging
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from dwakd.environment import version_of
from dwakd.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil a large language model into a small one whose tokenizer is different.",
    epilog="Start with [bold]dwakd demo[/bold]: it needs no network and takes about ten minutes on two cores.",
)
console = Console()


def output_option(description: str, **limits: Any) -> Any:
    return typer.Option("--output", "-o", help=description, **limits)


def flag(name: str, description: str) -> Any:
    return typer.Option(name, help=description)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"dwakd {version_of('dwakd')}")
        raise typer.Exit
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Accept the options that stand before a command."""


def silence_transformers() -> None:
    """Silence the progress bars and notices of transformers, which hide the command's own output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _print_error(text: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)


_OF_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ELOOP)
"""Error codes of paths that the user gave, as opposed to errors of dwakd."""


def main() -> None:
    """Run the command line; a UserError is printed as one sentence on standard error, with exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # print what the terminal cannot show, such as lone surrogates
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(standalone_mode=True)
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            _print_error(
                f"no space is left on the disk ({error.filename or error.strerror}): free some space and start the command "
                "again, which continues with what is finished"
            )
        elif error.errno in _OF_PATHS and error.filename:
            _print_error(f"{error.filename} cannot be used: {error.strerror}")
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
