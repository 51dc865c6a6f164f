"""Write evaluations to disk and show them as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from dwakd.errors import UserError
from dwakd.evaluation.evaluate import Evaluation
from dwakd.evaluation.signature import differences, shown
from dwakd.evaluation.summary import Summary

_OF_ONE_SET = ("data", "references")


def write_evaluation(evaluation: Evaluation, json_path: str | Path, answers_path: str | Path | None = None) -> None:
    """Write the numbers and their signature as JSON and, if a path is given, the answers as jsonl.

    A line of the answers has the row, seed (null if greedy), prompt, answer, references and scores. Each file is
    written atomically, and folders are created as needed.

    Args:
        evaluation: the result of `evaluate_model`.
        json_path: file of the numbers.
        answers_path: file of the answers.

    Raises:
        UserError: a number is NaN or infinite.
    """
    try:
        lines = [json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) for answer in evaluation.answers]
        numbers = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{json_path} was not written, because the metrics contain NaN or inf: check the model's weights"
        ) from None
    if answers_path is not None:
        _write_atomically(answers_path, "\n".join(lines))
    _write_atomically(json_path, numbers)


def check_overwrite(json_path: Path, signature: Mapping[str, Any]) -> None:
    """Check that a file does not exist, or holds results with the same signature, which may be replaced.

    Raises:
        UserError: the file has another signature or is not an evaluation; the message lists the differences.
    """
    if not json_path.exists():
        return
    try:
        old = json.loads(json_path.read_text(encoding="utf-8"))["signature"]
        found = differences(old, signature)
    except (ValueError, KeyError, TypeError, AttributeError):
        found = ["the file is not an evaluation"]
    if found:
        raise UserError(
            f"{json_path} holds other results ({'; '.join(found)}): choose another folder with --output, or replace "
            "them with --overwrite"
        )


def evaluation_table(rows: Mapping[str, Evaluation]) -> Table:
    """Return a table with a row for each test set, their unweighted mean, notes and the signature.

    The table fits into 80 columns. The mean of a column is over the sets that have the number.
    """
    table = Table(box=box.HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.title, table.title_justify = "ROUGE-L and exact match in percent", "left"
    table.add_column("test set", overflow="fold")
    for heading in (
        "ROUGE-L\nsampled",
        "95 %\ninterval",
        "ROUGE-L\ngreedy",
        "exact\nsampled",
        "exact\ngreedy",
        "bits per\nbyte",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, evaluation in rows.items():
        rouge = evaluation.rouge_l or evaluation.greedy_rouge_l
        interval = "-" if rouge is None else f"{rouge.interval[0]:.1f}–{rouge.interval[1]:.1f}"
        std = None if evaluation.rouge_l is None else evaluation.rouge_l.std
        table.add_row(name, *_cells(_numbers(evaluation), interval, std))
    columns = [
        [value for value in column if value is not None] for column in zip(*map(_numbers, rows.values()), strict=True)
    ]
    if (most := max(map(len, columns))) > 1:
        table.add_section()
        table.add_row(f"mean of {most} sets", *_cells([fmean(column) if column else None for column in columns], ""))
    table.caption = "\n".join([*_notes(rows), *_signatures(rows)])
    return table


def _numbers(evaluation: Evaluation) -> list[float | None]:
    """Return sampled and greedy ROUGE-L, sampled and greedy exact match, and bits per byte."""
    names = ("rouge_l", "greedy_rouge_l", "exact_match", "greedy_exact_match")
    summaries: list[Summary | None] = [getattr(evaluation, name) for name in names]
    bits = evaluation.bits_per_byte
    return [*(None if item is None else item.mean for item in summaries), None if bits is None else bits.value]


def _cells(numbers: Sequence[float | None], interval: str, std: float | None = None) -> list[str]:
    sampled, *scores = ("-" if value is None else f"{value:.2f}" for value in numbers[:-1])
    bits = "-" if numbers[-1] is None else f"{numbers[-1]:.3f}"
    return [sampled if std is None else f"{sampled} ± {std:.2f}", interval, *scores, bits]


def _notes(rows: Mapping[str, Evaluation]) -> list[str]:
    """Return one line for each set: its rows, and why a number is missing or covers fewer rows."""
    lines = []
    for name, evaluation in rows.items():
        notes = [f"{evaluation.num_examples} rows"]
        bits = evaluation.bits_per_byte
        if evaluation.signature["references"] == "none":
            notes.append("no references: answers without scores (or name their column with --response)")
        elif bits is None:
            notes.append("bits per byte: no row has a response that fits")
        else:
            if bits.num_examples < evaluation.num_examples:
                notes.append(f"bits per byte of {bits.num_examples} rows")
            if bits.num_truncated:
                notes.append(f"bits per byte: {bits.num_truncated} responses cut")
        lines.append(f"{name}: {'; '.join(notes)}")
    return lines


def _signatures(rows: Mapping[str, Evaluation]) -> list[str]:
    """Return the signature apart from the set itself, in one line for each group of sets that share it."""
    lines: dict[str, list[str]] = {}
    for name, evaluation in rows.items():
        parts = (f"{key} {shown(value)}" for key, value in evaluation.signature.items() if key not in _OF_ONE_SET)
        lines.setdefault(", ".join(parts), []).append(name)
    if len(lines) == 1:
        return list(lines)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def _write_atomically(path: str | Path, text: str) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(target)
