"""Read what is to be inspected, inspect it, and return what the terminal or a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from dwakd.answers.prompts import section_encoder, train_source
from dwakd.answers.run import training_examples
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.data.turns import checked_text
from dwakd.errors import UserError
from dwakd.folders import check_output_folder
from dwakd.inspection.checks import Finding, check_end_tokens, check_ends, check_prompts, check_responses
from dwakd.inspection.computed import Computed, compute
from dwakd.inspection.html import overview_section, row_section
from dwakd.inspection.terminal import overview, row_view
from dwakd.inspection.tokens import Row, Summary, align_rows
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import Recipe, load_recipe, recipe_from_dict
from dwakd.report.page import Section, require_charts, write_page
from dwakd.training.run_folder import RUN_FILE


class Inspection(NamedTuple):
    """The counts and warnings of a sample, and the rows to show with what each method computed for them."""

    summary: Summary
    findings: list[Finding]
    rows: list[tuple[Row, list[Computed]]]
    with_prompt: bool

    def sections(self) -> list[Section]:
        """Return the sections of an HTML page."""
        rows = [row_section(*row, with_prompt=self.with_prompt) for row in self.rows]
        return [overview_section(self.summary, self.findings), *rows]

    def terminal(self, *, with_rows: bool = True) -> list[RenderableType]:
        """Return what the terminal shows."""
        rows = [part for row in self.rows for part in row_view(*row, with_prompt=self.with_prompt)]
        return [*overview(self.summary, self.findings), *(rows if with_rows else ())]


def inspect_recipe(
    recipe: Recipe,
    run: Path | None = None,
    *,
    text: str | None = None,
    rows: int = 3,
    row: int | None = None,
    sample: int = 200,
) -> Inspection:
    """Inspect rows of a recipe and, if it has been trained, what its loss computes for them.

    Args:
        recipe: the recipe.
        run: the folder of its run. Student and teacher then run on the rows to show.
        text: a response to inspect, without a prompt, instead of the rows.
        rows: number of rows to show.
        row: number of the only row to show, counted from 0.
        sample: number of rows, spread evenly over the data set, in which matches and mistakes are counted.

    Raises:
        UserError: the data or the models cannot be used, or there is no such row.
    """
    data, sections = recipe.data, [recipe.student, *recipe.teachers[:1]]
    examples = _examples(recipe) if text is None else [Example(0, "", response=checked_text(text, "--text"))]
    if text is None and data.teacher_key is not None:
        examples = [example for example in examples if example.teacher == recipe.teacher_names[0]]
    if not examples:
        raise UserError(f"{data.train}: no row names the first teacher in the column {data.teacher_key!r}")
    encoders = [section_encoder(one, data) for one in sections]
    limits = data.model_dump(include={"max_length", "max_prompt_length"}) | {
        "source": data.train,
        "length_option": None,
    }
    chosen = examples[:: -(-len(examples) // sample)]
    pairs = encode_pairs(chosen, *encoders, **limits, invalid_rows="skip")
    summary = Summary(pairs, align_rows(pairs, chosen, encoders))
    wanted = [one.example_id for one in pairs.rows[:rows]] if row is None else [row]
    shown = [example for example in examples if example.index in wanted]
    if not shown:
        own = " of the first teacher" if data.teacher_key is not None else ""
        raise UserError(
            f"--row {row}: {data.train} has no such row{own}; its rows are numbered 0 to {examples[-1].index}"
        )
    pairs_shown = encode_pairs(shown, *encoders, **limits)
    findings = [*check_responses(summary, data), *check_end_tokens([one.model for one in sections], encoders)]
    findings += check_prompts(pairs, data, encoders) if text is None else ()
    computed: list[list[Computed]] = [[] for _ in shown]
    if len(recipe.teachers) > 1:
        own = " on its own rows" if data.teacher_key is not None and text is None else ""
        findings.append(("several teachers", f"Only the first of {len(recipe.teachers)} teachers is shown{own}."))
    loaded = recipe.loss.needs_teacher and recipe.teachers[0].url is None
    if run is not None and loaded and (run / RUN_FILE).is_file():
        computed, ends = compute(run, recipe, pairs_shown, encoders)
        findings += check_ends(ends)
    elif run is not None:
        findings.append(("models not run", "The run is not finished, or its method needs no teacher that is loaded."))
    aligned = align_rows(pairs_shown, shown, encoders)
    return Inspection(summary, findings, list(zip(aligned, computed, strict=True)), with_prompt=text is None)


def sections(run: Path, **options: Any) -> list[Section]:
    """Return the sections of an HTML page on rows of the folder of a run, with the options of `inspect_recipe`."""
    return inspect_recipe(load_recipe(run / RECIPE_FILE), run, **options).sections()


def inspect_command(
    target: Path | None,
    overrides: list[str],
    models: tuple[str | None, str | None],
    output: Path | None,
    **options: Any,
) -> Group:
    """Inspect what the command line names, write the page if `output` is given, and return what the terminal shows."""
    if output is not None:
        require_charts()
        check_output_folder(output.parent)
    run = target if target is not None and target.is_dir() else None
    if any(models) if target is not None else not (options["text"] and all(models)):
        raise UserError("give either a recipe or the folder of a run, or --text with --student and --teacher")
    if run is not None and not (run / RECIPE_FILE).is_file():
        raise UserError(f"{run} has no {RECIPE_FILE}: give a recipe, or a folder that dwakd train has written")
    if target is None:
        student, teacher = ({"model": name} for name in models)
        data = {"train": "--text", "template": "plain", "max_length": 1_000_000}
        recipe = recipe_from_dict({"student": student, "teacher": teacher, "data": data})
    else:
        recipe = load_recipe(target if run is None else run / RECIPE_FILE, overrides)
    found = inspect_recipe(recipe, run, **options)
    if output is None:
        return Group(*found.terminal())
    write_page(output, "Inspection", found.sections(), subtitle=str(target or ", ".join(map(str, models))))
    return Group(*found.terminal(with_rows=False), Text(f"page: {output}"))


def _examples(recipe: Recipe) -> list[Example]:
    """Return the rows to train on. The teacher's answers are read but never made."""
    answers = recipe.generate.output
    if recipe.data.responses == "given":
        return list(train_source(recipe.data))
    if answers is None or not Path(answers).expanduser().is_file():
        fix = "run dwakd generate, or set data.responses=given to inspect the labelled rows"
        raise UserError(f"the teacher's answers {answers} (generate.output) do not exist yet; {fix}")
    return training_examples(recipe, write=False)
