"""The commands that measure and show what was trained: `dwakd eval | judge | similarity | report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dwakd.cli.app import app, console, flag, output_option, silence_transformers
from dwakd.cli.options import ModelName, with_options
from dwakd.errors import UserError
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.judge.options import JudgeOptions


@app.command("eval")
@with_options(omit=("do_sample",))
def evaluate(
    model: ModelName,
    data: Annotated[list[str], typer.Option("--data", "-d", help="Test set: a file or a hub id; may be repeated.")],
    rows: RowOptions,
    options: EvalOptions,
    text: Annotated[
        list[str] | None, typer.Option(help="Text for bits per byte without a prompt: rows with a column text.")
    ] = None,
    output: Annotated[
        Path | None, output_option("Folder of scores and answers; eval/ in that of the model or adapter by default.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to merge into the model.")] = None,
    draft_for: Annotated[
        str | None, typer.Option(help="A target model: measure how many tokens of MODEL it accepts as a draft.")
    ] = None,
    lookahead: Annotated[int | None, typer.Option(min=1, help="Tokens of a draft, with --draft-for: 5.")] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace results that were made with other options.")] = False,
) -> None:
    """Answer test sets and score them: ROUGE-L over seeds, exact match, bits per byte, calibration error.

    --decoding minillm with the other defaults is the protocol of the published tables. Bits per byte can be compared
    between models with different tokenizers. Template, bos and special-tokens-in-prompts are by default those of the
    recipe in the adapter's folder or else in the model's, if there is one. --draft-for measures speculative decoding instead of
    scores, and cannot be combined with the options of scores.
    """
    silence_transformers()
    given = options.model_dump(exclude_defaults=True, exclude={"max_new_tokens"}) | ({"text": text} if text else {})
    if draft_for is not None and given:
        name, value = next(iter(given.items()))
        option = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        raise UserError(f"--draft-for does not use {option}: leave it out")
    if draft_for is None and lookahead is not None:
        raise UserError("--lookahead has no effect without --draft-for: leave it out")
    if draft_for is not None:
        from dwakd.evaluation.draft import evaluate_draft_sets

        table = evaluate_draft_sets(
            model,
            draft_for,
            data,
            rows,
            lookahead=lookahead or 5,
            max_new_tokens=options.max_new_tokens,
            adapter=adapter,
            output=output,
            overwrite=overwrite,
        )
        console.print(table)
        return
    from dwakd.evaluation.run import evaluate_sets

    table = evaluate_sets(
        model, data, rows, options, text=text or (), adapter=adapter, output=output, overwrite=overwrite
    )
    console.print(table)


@app.command()
@with_options()
def judge(
    a: Annotated[Path, typer.Argument(help="A run with results of dwakd eval, or a jsonl file of answers.")],
    b: Annotated[Path, typer.Argument(help="The run to compare it with.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Name of the judge on the server.")],
    options: JudgeOptions,
    base_url: Annotated[str, typer.Option(help="Address of the server.")] = "https://api.openai.com/v1",
    output: Annotated[Path | None, output_option("Folder of the results; judge/A-B by default.")] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace results that were made with other options.")] = False,
    yes: Annotated[bool, flag("--yes", "Start also if the estimated cost is above 1.")] = False,
) -> None:
    """Let a language model compare the answers of two runs: win, tie and loss with intervals.

    The key is read from OPENAI_API_KEY. Every verdict is stored as it arrives, so a command that was interrupted can be
    started again without repeating requests.
    """
    silence_transformers()
    from dwakd.judge.run import judge_runs
    from dwakd.recipe.sections import EndpointSection

    section = EndpointSection(base_url=base_url, model=model)
    console.print(judge_runs((a, b), section, options, output=output, overwrite=overwrite, yes=yes))


@app.command()
@with_options(limit=100)
def similarity(
    students: Annotated[list[str], typer.Argument(help="One or more: folder, hub id, gguf:PATH, package:NAME/FILE.")],
    teacher: Annotated[str, typer.Option("--teacher", "-t", help="The teacher: folder, hub id, GGUF file.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Prompts with responses: a file or a hub id.")],
    rows: RowOptions,
    output: Annotated[Path | None, output_option("JSON file for every value.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to merge into the teacher.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Maximum number of tokens of prompt and response.")] = 512,
) -> None:
    """Compare the hidden states of students with those of a teacher, also if their tokenizers differ.

    Hidden states are averaged over the spans of text that both tokenisations share. For each text, the similarities
    (cosines and inner products) between the spans are computed in both models, and box plots show how much they differ.
    Template, bos and special-tokens-in-prompts are by default those of the recipe in a student's folder, if there is one.
    """
    silence_transformers()
    from dwakd.tools.similarity import compare_representations

    report = compare_representations(
        students, teacher, data, rows, adapter=adapter, max_length=max_length, output=output
    )
    console.print(report)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of dwakd train, dwakd compare or dwakd demo.")],
    output: Annotated[Path, output_option("The HTML file.")] = Path("report.html"),
    rows: Annotated[int, typer.Option(min=0, help="Rows of each test set whose answers are shown.")] = 100,
    alignments: Annotated[int, typer.Option(min=0, help="Training rows to show as dwakd inspect does.")] = 0,
) -> None:
    """Write an HTML page about runs: results, curves, time and memory, answers side by side, options and environment.

    The page is one file that needs no network. It can be sent by mail, read on a phone and printed.
    """
    silence_transformers()
    from dwakd.report.page import require_charts

    require_charts()
    from dwakd.report.report import write_report

    for note in write_report(runs, output, num_rows=rows, num_aligned=alignments):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False, soft_wrap=True
    )
