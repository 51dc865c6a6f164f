"""Write one page about runs and comparisons: the work of `dwakd report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from dwakd.errors import UserError
from dwakd.folders import check_output_folder
from dwakd.inspection.inspect import sections as inspected
from dwakd.report import sections
from dwakd.report.answers import answers
from dwakd.report.collect import Collection, collect
from dwakd.report.page import Section, details, heading, join, write_page


def write_report(folders: Sequence[Path], output: Path, *, num_rows: int = 100, num_aligned: int = 0) -> list[str]:
    """Write a standalone HTML page about the runs in folders of `dwakd train`, `dwakd compare` and `dwakd demo`.

    At most `num_rows` rows of each test set are shown with their answers. The tokens of `num_aligned` training rows are shown
    as `dwakd inspect` does; this runs the models of the first run whose method has a teacher.

    Returns:
        Notes on the runs that failed and the files that the page leaves out.

    Raises:
        UserError: a folder contains no run, or the file cannot be written.
    """
    check_output_folder(output.parent)
    if output.is_dir():
        raise UserError(f"{output} is a folder: name an HTML file with --output")
    found = collect(folders)
    rows = list(dict.fromkeys(run.row for run in found.runs))
    aligned = _alignments(found, num_aligned)  # before the summary, which shows the notes
    bodies = {
        "Summary": sections.summary(found),
        "Results": sections.results(found.runs, rows),
        "Training": sections.training_curves(found.runs, rows),
        "Time and memory": sections.cost(found.runs),
        "Similarity": sections.similarity(found),
        "Answers": answers(found.runs, num_rows),
        "Alignments": aligned,
        "Options": sections.options(found.runs),
        "Environment": sections.environment(found.runs),
    }
    shown = [Section(title, body) for title, body in bodies.items() if body is not None]
    write_page(output, "Distillation report", shown, subtitle=", ".join(map(str, folders)))
    return found.notes


def _alignments(found: Collection, num_rows: int) -> Markup | None:
    taught = [run for run in found.runs if any(name.startswith("teacher.") for name in run.options)]
    run = next((run for run in taught if run.method != "sft"), next(iter(taught), None))
    if run is None or num_rows == 0:
        return None
    try:
        parts = inspected(run.folder, rows=num_rows)
    except UserError as error:  # models and data can be on another machine
        found.notes.append(f"the alignments of {run.name} are left out ({error})")
        return None
    return join(heading(run.name), *(details(part.title, part.body) for part in parts))
