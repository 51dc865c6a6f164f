"""Options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options to change, as section.option=value: loss.temperature=4")
]
PromptColumn = Annotated[str | None, typer.Option("--prompt", help="Column of the prompt.")]
ResponseColumn = Annotated[str | None, typer.Option("--response", help="Column of the response or the references.")]
InputColumn = Annotated[str | None, typer.Option("--input", help="Column of the optional input.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first rows of each set.")]
