"""The section of a report that shows the answers of all runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from dwakd.evaluation.evaluate import Answer
from dwakd.report.collect import Run
from dwakd.report.page import data_text, details, join, paragraph, searchable

BYTES = 2_500_000
"""Most bytes of HTML of all answers together, so that a report stays below 5 MB."""
CHARACTERS = 4_000
"""Most characters of a text that are shown."""
_ANSWER = Markup('<div class="answer"><h4><bdi>{}</bdi> <small>{}</small></h4>{}</div>')
_ROW = Markup('<h3><bdi>{}</bdi>, row {}</h3>{}{}<div class="answers">{}</div>')


def answers(runs: Sequence[Run], num_rows: int) -> Markup | None:
    """Show the first rows of each test set with the answers of all runs, and a box to search them.

    These are the greedy answers, or else those of the first seed at the first temperature.
    """
    parts: list[Markup] = []
    size, skipped = 0, 0
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        chosen = {run.name: _one_pass(run.evaluations[name].answers) for run in runs if name in run.evaluations}
        for number, row in enumerate(sorted({row for found in chosen.values() for row in found})):
            if number >= num_rows or size > BYTES:
                skipped += 1
                continue
            parts.append(_row(name, {run: found[row] for run, found in chosen.items() if row in found}))
            size += len(parts[-1].encode("utf-8", "replace"))
    text = "The greedy answers, or else those of the first seed at the first temperature, with their ROUGE-L."
    if skipped:
        text += f" {skipped:,} of {skipped + len(parts):,} rows are not shown; dwakd report --rows sets how many are."
    return join(paragraph(text), searchable(parts, "Search prompts and answers")) if parts else None


def _one_pass(found: Sequence[Answer]) -> dict[int, Answer]:
    """Return the answers of one pass by row."""
    passes: dict[tuple[int | None, float | None], dict[int, Answer]] = {}
    for one in found:
        passes.setdefault((one.seed, one.temperature), {})[one.row] = one
    return passes.get((None, None)) or next(iter(passes.values()), {})


def _row(name: str, found: dict[str, Answer]) -> Markup:
    one = next(iter(found.values()))
    scored = {run: "" if item.rouge_l is None else f"{item.rouge_l:.1f}" for run, item in found.items()}
    shown = [_ANSWER.format(run, scored[run], _text(item.answer)) for run, item in found.items()]
    references = details("References", join(*map(_text, one.references))) if one.references else ""
    return _ROW.format(name, one.row, _text(one.prompt), references, join(*shown))


def _text(text: str) -> Markup:
    if not text.strip():
        return Markup("<small>empty</small>")
    left_out = len(text) - CHARACTERS
    return data_text(text if left_out <= 0 else f"{text[:CHARACTERS]} … ({left_out:,} more characters)")
