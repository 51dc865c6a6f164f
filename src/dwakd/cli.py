"""The command line: `dwakd train | cache | generate | eval | similarity | compare | shrink | demo | methods | schema | env`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from dwakd.cli_options import ModelName, Overrides, with_options
from dwakd.environment import describe_environment, version_of
from dwakd.errors import UserError
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.folders import check_output_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil a large language model into a small one whose tokenizer is different.",
    epilog="Start with [bold]dwakd demo[/bold]: it needs no network and takes about ten minutes on two cores.",
)
console = Console()


def _output(description: str, **limits: Any) -> Any:
    return typer.Option("--output", "-o", help=description, **limits)


def _flag(name: str, description: str) -> Any:
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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with sections student, teacher, data, loss, training.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, _output("Folder of the result; runs/NAME of the recipe by default.")] = None,
    resume: Annotated[bool, _flag("--resume", "Continue from the last checkpoint in the folder.")] = False,
) -> None:
    """Train a student as a recipe describes, then evaluate it on the recipe's test sets.

    The result is a plain Hugging Face folder: AutoModelForCausalLM.from_pretrained(FOLDER).
    """
    _silence_transformers()
    from dwakd.evaluation.run import evaluate_plan, plan_evaluation
    from dwakd.recipe.recipe import load_recipe
    from dwakd.training.run import end_of_run
    from dwakd.training.run import train as run_recipe

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / recipe.stem
    plan = plan_evaluation(loaded)
    trainer = run_recipe(loaded, folder, plan, resume=resume)
    if trainer.is_world_process_zero():
        console.print(f"student: [bold]{folder}[/bold] after {trainer.state.global_step} steps", soft_wrap=True)
    if plan.sets and trainer.is_world_process_zero():
        student, encoder = trainer.student, trainer.student_encoder
        console.print(evaluate_plan(plan, student, encoder, folder / "eval", name=str(folder), overwrite=True))
    end_of_run()


@app.command()
def cache(
    recipe: Annotated[Path, typer.Argument(help="A recipe; with --check also the folder of a cache.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, _output("Folder of the cache; the recipe's teacher.cache by default.")] = None,
    check: Annotated[bool, _flag("--check", "Build nothing; verify the cache and list what is damaged.")] = False,
) -> None:
    """Run the teacher once over a recipe's training and evaluation rows and store its final hidden states.

    Training with teacher.cache: FOLDER then loads only the teacher's embeddings and head, and gives the same student.
    dwakd train builds a missing cache itself. This command builds it in advance, continues a build that was
    interrupted, and rebuilds damaged files. Size: response tokens x hidden size x 4 bytes, or half of it with
    teacher.cache_dtype=bfloat16, which rounds the states of a teacher that runs in float32.
    """
    _silence_transformers()
    from dwakd.training.cache_run import cache_command
    from dwakd.training.run import end_of_run

    text = cache_command(recipe, overrides or [], output, check=check)
    if os.environ.get("RANK", "0") == "0":
        console.print(text, soft_wrap=True, highlight=False)
    end_of_run()


@app.command()
def generate(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose section generate names prompts and options.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, _output("The jsonl file of the answers; generate.output by default.")] = None,
) -> None:
    """Let the teacher of a recipe, or an endpoint, answer prompts, and write prompts and answers as jsonl.

    If the command is started again, it continues with the prompts that are not answered. data.responses=teacher trains
    on the answers; dwakd train then runs this command first if the file is missing.
    """
    _silence_transformers()
    from dwakd.answers.run import generate_command

    text = generate_command(recipe, overrides or [], output)
    if os.environ.get("RANK", "0") == "0":
        console.print(text, soft_wrap=True, highlight=False)


@app.command("eval")
@with_options(omit=("do_sample", "max_length"))
def evaluate(
    model: ModelName,
    data: Annotated[list[str], typer.Option("--data", "-d", help="Test set: a file or a hub id; may be repeated.")],
    rows: RowOptions,
    options: EvalOptions,
    text: Annotated[
        list[str] | None, typer.Option(help="Text for bits per byte without a prompt: rows with a column text.")
    ] = None,
    output: Annotated[Path | None, _output("Folder of scores and answers; eval/ in the model's by default.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to merge into the model.")] = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace results that were made with other options.")] = False,
) -> None:
    """Answer test sets and score them: ROUGE-L over seeds, exact match, bits per byte, calibration error.

    Sampling at temperature 1 over five seeds with --decoding minillm is the protocol of the published tables. Bits per
    byte can be compared between models with different tokenizers. Template, bos and special-tokens-in-prompts are by
    default those of the recipe in the model's folder, if there is one.
    """
    _silence_transformers()
    from dwakd.evaluation.run import evaluate_sets

    table = evaluate_sets(
        model, data, rows, options, text=text or (), adapter=adapter, output=output, overwrite=overwrite
    )
    console.print(table)


@app.command()
@with_options(template="alpaca", bos="auto", special_tokens_in_prompts="parse", limit=100)
def similarity(
    students: Annotated[list[str], typer.Argument(help="One or more: folder, hub id, gguf:PATH, package:NAME/FILE.")],
    teacher: Annotated[str, typer.Option("--teacher", "-t", help="The teacher: folder, hub id, GGUF file.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Prompts with responses: a file or a hub id.")],
    rows: RowOptions,
    output: Annotated[Path | None, _output("JSON file for every value.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to merge into the teacher.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and response.")] = 512,
) -> None:
    """Compare how students and a teacher relate the parts of a text to each other, whatever their tokenizers.

    Hidden states are averaged over the spans of text that both tokenisations share. Box plots show the distances
    between the cosine matrices and between the inner-product matrices of student and teacher, one value for each text.
    """
    _silence_transformers()
    from dwakd.tools.similarity import compare_representations

    report = compare_representations(
        students, teacher, data, rows, adapter=adapter, max_length=max_length, output=output
    )
    console.print(report)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A YAML file whose section compare names rows and seeds.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, _output("Folder of the result; compare/NAME of the recipe by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods or rows of the recipe, separated by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, separated by commas: 1,2,3.")] = None,
    ablation: Annotated[bool, _flag("--ablation", "Compare the rows of the paper's ablation instead.")] = False,
    lr_sweep: Annotated[bool, _flag("--lr-sweep", "First choose each row's rates and weight on the dev set.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of runs at a time.")] = 1,
) -> None:
    """Train methods, sums of methods or other variants of a recipe, with several seeds, and compare them in one table.

    If the command is started again, it continues with the runs that are not finished. A failed run is reported with
    its reason.
    """
    _silence_transformers()
    from dwakd.compare.compare import compare_methods
    from dwakd.recipe.recipe import load_recipe

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also stop the runs, as Ctrl-C does
    chosen = [f"compare.{name}=[{given}]" for name, given in (("methods", methods), ("seeds", seeds)) if given]
    loaded = load_recipe(recipe, [*(overrides or []), *chosen], "compare")
    folder = output or Path("compare") / recipe.stem
    tables, any_finished = compare_methods(loaded, folder, ablation=ablation, lr_sweep=lr_sweep, jobs=jobs)
    console.print(tables)
    console.print(f"runs, logs and all numbers: [bold]{folder}[/bold]", soft_wrap=True)
    if not any_finished:
        raise typer.Exit(1)


@app.command()
@with_options(omit=("bos", "special_tokens_in_prompts"), template="plain")
def shrink(
    model: ModelName,
    data: Annotated[str, typer.Option("--data", "-d", help="Your text: an instruction set, a file or a hub id.")],
    output: Annotated[Path, _output("Folder of the new student.")],
    rows: RowOptions,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Train a tokenizer of this size on the text.")] = None,
    layers: Annotated[int | None, typer.Option(min=2, help="Layers to keep, by block influence.")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text for bits per byte; by default a part of the data.")
    ] = None,
) -> None:
    """Build a small student from a pretrained model: fewer layers, and a vocabulary made for your text.

    Example: dwakd shrink HuggingFaceTB/SmolLM2-135M-Instruct --data databricks/databricks-dolly-15k --vocab-size 8000
    --layers 20 -o student
    """
    _silence_transformers()
    from dwakd.tools.shrink.shrink import shrink_to_folder

    report = shrink_to_folder(model, data, output, rows, vocab_size=vocab_size, num_layers=layers, eval_data=eval_data)
    console.print(report)


@app.command()
def demo(
    output: Annotated[Path | None, _output("Output folder; demo-run by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the corpus, the models and the training.")] = 0,
    quick: Annotated[bool, _flag("--quick", "Take a few steps only, to check that everything works.")] = False,
) -> None:
    """Pretrain a student, let a teacher with another tokenizer answer prompts, and compare ways to learn from it. Offline."""
    _silence_transformers()
    from dwakd.tools.demo.run import run_demo

    console.print(run_demo(output, seed=seed, quick=quick))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show the options of this method.")] = None) -> None:
    """List the methods, or the options of one method with their defaults."""
    from dwakd.describe import method_page, methods_table

    console.print(methods_table() if name is None else method_page(name))


@app.command()
def schema(
    output: Annotated[Path | None, _output("File to write; by default the terminal.", dir_okay=False)] = None,
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
    """Show the versions and hardware that a bug report needs, as text to paste."""
    typer.echo(describe_environment())


def _silence_transformers() -> None:
    """Silence the progress bars and notices of transformers, which hide the command's own output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Run the command line; a UserError is printed as one sentence on standard error, with exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app(standalone_mode=True)
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
