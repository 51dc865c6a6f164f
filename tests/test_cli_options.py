"""Test command-line options that are generated from the fields of an options model."""

from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from dwakd.cli.options import with_options
from dwakd.evaluation.options import EvalOptions, RowOptions


def call(*arguments: str, **decoration: Any) -> tuple[Any, dict[str, Any]]:
    """Return the result of a command with both models, and the values that it received."""
    app, received = typer.Typer(), {}

    @app.command()
    @with_options(**decoration)
    def command(
        model: Annotated[str, typer.Argument()], rows: RowOptions, options: EvalOptions, adapter: str | None = None
    ) -> None:
        """Receive the options."""
        received.update(model=model, rows=rows, options=options, adapter=adapter)

    return CliRunner().invoke(app, list(arguments)), received


def test_fields_become_options() -> None:
    """Values that are given on the command line reach the command."""
    result, received = call(
        "m",
        "--limit",
        "3",
        "--top-p",
        "0.5",
        "--no-greedy",
        "--adapter",
        "a",
        "--template",
        "chat",
        "--temperatures",
        "1",
        "--temperatures",
        "0.7",
    )
    assert result.exit_code == 0, result.output
    assert (received["model"], received["adapter"]) == ("m", "a")
    assert received["rows"] == RowOptions(limit=3, template="chat")
    assert received["options"] == EvalOptions(top_p=0.5, greedy=False, temperatures=[1.0, 0.7])


def test_a_command_may_leave_fields_out_and_change_defaults() -> None:
    """A command may omit fields and change defaults, as `dwakd shrink` does for the template."""
    result, received = call("m", omit=("bos",), template="plain", limit=100)
    assert result.exit_code == 0, result.output
    assert received["rows"] == RowOptions(template="plain", limit=100)
    assert call("m", "--bos", "auto", omit=("bos",))[0].exit_code == 2


@pytest.mark.parametrize("arguments", [("--limit", "0"), ("--top-p", "2"), ("--seeds", "x"), ("--temperatures", "0")])
def test_values_out_of_range_are_refused(arguments: tuple[str, str]) -> None:
    """Values outside the range that the help shows are refused."""
    result, received = call("m", *arguments)
    assert result.exit_code != 0
    assert not received
