"""The other commands: `dwakd inspect | shrink | demo | methods | schema | env`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dwakd.cli.app import app, console, flag, output_option, silence_transformers
from dwakd.cli.options import ModelName, Overrides, with_options
from dwakd.environment import describe_environment
from dwakd.evaluation.options import RowOptions
from dwakd.folders import check_output_folder


@app.command("inspect")
def inspect_rows(
    target: Annotated[
        Path | None, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run.")
    ] = None,
    overrides: Overrides = None,
    text: Annotated[str | None, typer.Option(help="Inspect this response instead of the rows.")] = None,
    student: Annotated[str | None, typer.Option(help="With --text, without a recipe: the student's tokenizer.")] = None,
    teacher: Annotated[str | None, typer.Option(help="With --text, without a recipe: the teacher's tokenizer.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 3,
    row: Annotated[int | None, typer.Option(min=0, help="Show only this row, counted from 0.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Number of rows over which matches are counted.")] = 200,
    output: Annotated[Path | None, output_option("HTML file to write instead.", dir_okay=False)] = None,
) -> None:
    """Show prompts, the tokens of both models side by side, what is supervised, and common mistakes.

    For the folder of a run, the models also run on the rows. The page (-o FILE.html) then has heat maps of the
    cross-model attention and of the Soft-DTW alignment, and the response coloured by entropy, gate and weights.
    """
    silence_transformers()
    from dwakd.inspection.inspect import inspect_command

    options = {"text": text, "rows": rows, "row": row, "sample": sample}
    console.print(inspect_command(target, overrides or [], (student, teacher), output, **options), highlight=False)


@app.command()
@with_options(omit=("bos", "special_tokens_in_prompts"), template="plain")
def shrink(
    model: ModelName,
    data: Annotated[str, typer.Option("--data", "-d", help="Your text: an instruction set, a file or a hub id.")],
    output: Annotated[Path, output_option("Folder of the new student.")],
    rows: RowOptions,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Train a tokenizer of this size on the text.")] = None,
    layers: Annotated[int | None, typer.Option(min=2, help="Number of layers to keep, by their importance.")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text to measure bits per byte on; by default a part of the data.")
    ] = None,
) -> None:
    """Build a small student from a pretrained model: fewer layers, and a vocabulary made for your text.

    Example: dwakd shrink HuggingFaceTB/SmolLM2-135M-Instruct --data databricks/databricks-dolly-15k --vocab-size 8000
    --layers 20 -o student
    """
    silence_transformers()
    from dwakd.tools.shrink.shrink import shrink_to_folder

    report = shrink_to_folder(model, data, output, rows, vocab_size=vocab_size, num_layers=layers, eval_data=eval_data)
    console.print(report)


@app.command()
def demo(
    output: Annotated[Path | None, output_option("Output folder; demo-run by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the corpus, the models and the training.")] = 0,
    quick: Annotated[bool, flag("--quick", "Take a few steps only, to check that everything works.")] = False,
) -> None:
    """Pretrain a student, let a teacher with another tokenizer answer prompts, and compare ways to learn from it. Offline."""
    silence_transformers()
    from dwakd.tools.demo.run import run_demo

    console.print(run_demo(output, seed=seed, quick=quick))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show the options of this method.")] = None) -> None:
    """List the methods, or the options of one method with their defaults."""
    from dwakd.describe import method_page, methods_table

    console.print(methods_table() if name is None else method_page(name))


@app.command()
def schema(
    output: Annotated[Path | None, output_option("File to write; by default the terminal.", dir_okay=False)] = None,
) -> None:
    """Write the JSON Schema of a recipe, with which an editor completes and checks recipes."""
    from dwakd.recipe.recipe import recipe_schema

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        check_output_folder(output.parent)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


@app.command()
def env() -> None:
    """Show versions and hardware as text for a bug report."""
    typer.echo(describe_environment())
