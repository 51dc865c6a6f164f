"""Show what a training will need, and write nothing: `dwakd train --dry-run`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from rich import box
from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from dwakd.data.encoded import EncodedRow
from dwakd.evaluation.run import EvaluationPlan
from dwakd.inspection.inspect import inspect_recipe
from dwakd.inspection.prediction import Prediction, predict, teacher_name
from dwakd.inspection.terminal import row_view
from dwakd.recipe.recipe import Recipe
from dwakd.training.run_folder import check_output


def dry_run(recipe: Recipe, folder: Path, plan: EvaluationPlan, *, resume: bool) -> Group:
    """Train a few steps without writing a file; return tables of what the training will need, and three rows.

    Raises:
        UserError: the training into the folder could not start, or a step does not fit into the memory.
    """
    check_output(folder, resume=resume, recipe=recipe)
    shown = [] if recipe.training.get("lmbda") == 1 else inspect_recipe(recipe).rows  # the student answers all prompts
    found, longest = predict(recipe, plan)
    rows = [part for row, _ in shown for part in row_view(row, (), with_prompt=True)]
    return Group(*_tables(found), _longest(longest), *rows)


def _tables(found: Prediction) -> list[Table | str]:
    counts = [(name, *(f"{number:,}" for number in numbers)) for name, numbers in found.parameters.items()]
    sizes = [(name, decimal(size)) for name, size in found.memory.items()]
    sizes.append(("[bold]peak, on the longest rows", decimal(found.peak_bytes)))
    evaluations = [(f"each of {found.num_evaluations:,} evaluations", _duration(found.evaluation_seconds))]
    evaluations = evaluations if found.num_evaluations else []
    times = [
        ("optimiser step", f"{found.step_seconds:.3g} s"),
        ("part of it for teachers", f"{found.teacher_seconds:.3g} s"),
        (f"epoch of {found.steps_per_epoch:,} steps", _duration(found.steps_per_epoch * found.step_seconds)),
        *evaluations,
        ("building teacher caches", _duration(found.build_seconds)),
        (f"[bold]training of {found.num_steps:,} steps", _duration(found.seconds)),
    ]
    note = "[dim]Times are without loading, checkpoints, generated answers and the sets of the section evaluation.[/]"
    named = ((teacher_name(n, found.caches), one) for n, one in enumerate(found.caches, start=1) if one is not None)
    caches = [
        f"A cache of the {name} {'will' if one.is_configured else 'would'} take {decimal(one.num_bytes)}."
        for name, one in named
    ]
    tables = [_table("model", "parameters", "trained", rows=counts), _table("memory", "size", rows=sizes)]
    return [*tables, _table("time", "", rows=times), note, *caches]


def _longest(rows: list[EncodedRow]) -> Table:
    lengths = [[row.student.length, *(side.length for side in row.teachers)] for row in rows]
    cells = [
        (escape(row.place), f"{own:,}", ", ".join(f"{one:,}" for one in others), "yes" if row.truncated else "no")
        for row, (own, *others) in zip(rows, lengths, strict=True)
    ]
    return _table("longest rows", "student tokens", "teacher tokens", "cut", rows=cells)


def _table(*titles: str, rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(titles[0], box=box.SIMPLE, pad_edge=False)
    for title in titles[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
