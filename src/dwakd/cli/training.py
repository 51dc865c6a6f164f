"""The commands that train: `dwakd train | cache | generate | compare`."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from dwakd.cli.app import app, console, flag, output_option, silence_transformers
from dwakd.cli.options import Overrides
from dwakd.environment import global_rank
from dwakd.errors import UserError


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with sections student, teacher, data, loss, training.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, output_option("Folder of the result; runs/NAME of the recipe by default.")] = None,
    resume: Annotated[bool, flag("--resume", "Continue from the last checkpoint in the folder.")] = False,
    dry_run: Annotated[
        bool, flag("--dry-run", "Write nothing; predict memory and time from a few steps, and show rows.")
    ] = False,
) -> None:
    """Train a student as a recipe describes, then evaluate it on the recipe's test sets.

    The result is a plain Hugging Face folder: AutoModelForCausalLM.from_pretrained(FOLDER).

    Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint at the end of the current step and end the command with exit code 75;
    --resume continues. A second Ctrl-C ends it at once.
    """
    silence_transformers()
    from peft import PeftModel

    from dwakd.evaluation.card import update_results
    from dwakd.evaluation.run import evaluate_plan, plan_evaluation
    from dwakd.inspection.trackers import AlignmentCallback
    from dwakd.models.adapters import merge_adapter
    from dwakd.models.loading import load_causal_lm, on_device
    from dwakd.models.quantisation import is_quantised
    from dwakd.recipe.recipe import load_recipe
    from dwakd.training.end_of_run import end_of_run, end_other_ranks
    from dwakd.training.interruption import INTERRUPTED, RunInterrupted
    from dwakd.training.run import train as run_recipe

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / recipe.stem
    plan = plan_evaluation(loaded)
    if dry_run:
        from dwakd.inspection.dry_run import dry_run as predict

        with console.status("training a few steps to measure time and memory; nothing is written"):
            tables = predict(loaded, folder, plan, resume=resume)
        if global_rank() == 0:
            console.print(tables)
        end_of_run()
        return
    try:
        trainer = run_recipe(loaded, folder, plan, resume=resume, hook=AlignmentCallback)
    except RunInterrupted as stop:
        if global_rank() == 0:
            console.print(f"{escape(str(folder))}: {stop}", soft_wrap=True)
        end_of_run(INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        console.print(f"student: [bold]{escape(str(folder))}[/bold] after {steps} steps", soft_wrap=True)
    end_other_ranks()
    if plan.sets:
        student, encoder = trainer.student, trainer.student_encoder
        if trainer.is_sharded:
            student = load_causal_lm(str(folder), trust_remote_code=loaded.student.trust_remote_code)
            student = on_device(student, trainer.args.device)
        # dwakd eval also merges the adapter. Both then find the same digest of the weights.
        if isinstance(student, PeftModel) and not is_quantised(student):
            with suppress(UserError):
                student = merge_adapter(student, str(folder))
        console.print(evaluate_plan(plan, student, encoder, folder / "eval", name=str(folder), overwrite=True))
        update_results(folder)
        if trainer.args.push_to_hub:
            trainer.push_card()
    end_of_run()


@app.command()
def cache(
    recipe: Annotated[Path, typer.Argument(help="A recipe; with --check also the folder of a cache.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, output_option("Folder of the cache; the recipe's teacher.cache by default.")] = None,
    check: Annotated[bool, flag("--check", "Build nothing; verify the cache and list what is damaged.")] = False,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What runs the teacher; vllm uses all GPUs of the machine.")
    ] = "transformers",
) -> None:
    """Run the teacher once over a recipe's training and evaluation rows and store its final hidden states.

    Training with teacher.cache: FOLDER then loads only the teacher's embeddings and head, and gives the same student.
    dwakd train builds a missing cache itself. This command builds it in advance, continues a build that was
    interrupted, and rebuilds damaged files. Size: response tokens x hidden size x 4 bytes, or half of it with
    teacher.cache_dtype=bfloat16, which rounds the states of a teacher that runs in float32.
    """
    silence_transformers()
    from dwakd.training.cache_run import cache_command
    from dwakd.training.end_of_run import end_of_run

    text = cache_command(recipe, overrides or [], output, engine, check=check)
    if global_rank() == 0:
        console.print(text, markup=False, soft_wrap=True, highlight=False)
    end_of_run()


@app.command()
def generate(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose section generate names prompts and options.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, output_option("The jsonl file of the answers; generate.output by default.")] = None,
) -> None:
    """Let the teacher of a recipe, or an endpoint, answer prompts, and write prompts and answers as jsonl.

    If the command is started again, it continues with the prompts that are not answered. data.responses=teacher trains
    on the answers; dwakd train then runs this command first if the file is missing.
    """
    silence_transformers()
    from dwakd.answers.run import generate_command

    text = generate_command(recipe, overrides or [], output)
    if global_rank() == 0:
        console.print(text, markup=False, soft_wrap=True, highlight=False)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A YAML file whose section compare names rows and seeds.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, output_option("Folder of the result; compare/NAME of the recipe by default.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods or rows of the recipe, separated by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, separated by commas: 1,2,3.")] = None,
    ablation: Annotated[bool, flag("--ablation", "Compare the rows of the paper's ablation instead.")] = False,
    lr_sweep: Annotated[bool, flag("--lr-sweep", "First tune each row's rates and loss weight on data.eval.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of runs at a time.")] = 1,
) -> None:
    """Train methods, sums of methods or other variants of a recipe, with several seeds, and compare them in one table.

    If the command is started again, it continues with the runs that are not finished. A failed run is reported with
    its reason.
    """
    silence_transformers()
    from dwakd.compare.compare import compare_methods
    from dwakd.recipe.recipe import load_recipe

    if ablation and methods is not None:
        raise UserError("--ablation compares its own rows: leave out --methods")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also stop the runs, as Ctrl-C does
    chosen = [f"compare.{name}=[{given}]" for name, given in (("methods", methods), ("seeds", seeds)) if given]
    loaded = load_recipe(recipe, [*(overrides or []), *chosen], "compare")
    folder = output or Path("compare") / recipe.stem
    tables, any_finished = compare_methods(loaded, folder, ablation=ablation, lr_sweep=lr_sweep, jobs=jobs)
    console.print(tables)
    console.print(f"runs, logs and all numbers: [bold]{escape(str(folder))}[/bold]", soft_wrap=True)
    if not any_finished:
        raise typer.Exit(1)
