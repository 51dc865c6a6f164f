"""Write evaluations to disk and show them as a table."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dwakd.errors import UserError
from dwakd.evaluation.evaluate import Evaluation
from dwakd.folders import write_file

_COLUMNS: tuple[tuple[str, Callable[[Evaluation], float | None], int], ...] = (
    ("ROUGE-L\nsampled", lambda one: getattr(one.rouge_l, "mean", None), 2),
    ("ROUGE-L\ngreedy", lambda one: getattr(one.greedy_rouge_l, "mean", None), 2),
    ("exact\nsampled", lambda one: getattr(one.exact_match, "mean", None), 2),
    ("exact\ngreedy", lambda one: getattr(one.greedy_exact_match, "mean", None), 2),
    ("bits per\nbyte", lambda one: getattr(one.bits_per_byte, "value", None), 3),
    ("\nECE", lambda one: getattr(one.bits_per_byte, "ece", None), 2),
)
"""Heading, number (None is shown as a dash), and digits after the decimal point."""


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the numbers and their signature to a JSON file, and before it any answers to NAME.answers.jsonl.

    A line of the answers has the row, seed and temperature (null if greedy), question, prompt, answer, references and scores.

    Raises:
        UserError: a number is NaN or infinite.
    """
    try:
        lines = [json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) for answer in evaluation.answers]
        numbers = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{path} was not written, because the metrics contain NaN or inf: check the model's weights"
        ) from None
    answers = path.with_suffix(".answers.jsonl")
    path.unlink(missing_ok=True)  # an interruption must not leave these answers beside other numbers
    if lines:
        write_file(answers, ("\n".join(lines) + "\n").encode())
    else:
        answers.unlink(missing_ok=True)
    write_file(path, f"{numbers}\n".encode(errors="backslashreplace"))  # the name of a file may be no text


def check_overwrite(json_path: Path, signature: Mapping[str, Any]) -> None:
    """Check that a file does not exist, or holds results with the same signature, which may be replaced.

    Raises:
        UserError: the file has another signature or is not an evaluation; the message lists the differences.
    """
    if not json_path.exists():
        return
    fix = "choose another folder with --output, or replace it with --overwrite"
    try:
        before = _flat(json.loads(json_path.read_text(encoding="utf-8"))["signature"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{json_path} is not an evaluation: {fix}") from error
    now = _flat(signature)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        found = (f"{name} {_shown(before.get(name))} before, {_shown(now.get(name))} now" for name in changed)
        raise UserError(f"{json_path} holds other results ({'; '.join(found)}): {fix}")


def _flat(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a signature without the names of model and data, which may differ."""
    nested = {key: value if isinstance(value, dict) else {"": value} for key, value in signature.items()}
    names = [(key, name) for key, inner in nested.items() for name in inner if name not in ("name", "revision")]
    return {f"{key} {name}".strip(): nested[key][name] for key, name in names}


def _shown(value: Any) -> str:
    """Format a value of a signature as one line of text."""
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return "/".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def evaluation_table(rows: Mapping[str, Evaluation]) -> Table:
    """Return a table with a row for each test set, their unweighted mean, notes and the signature that they share.

    If there are further temperatures, each has its own row below that of a set. The table fits into 80 columns. The
    mean of a column is over the test sets that have the number, without sets of texts.
    """
    table = Table(box=box.HORIZONTALS, show_edge=False, padding=0, caption_justify="left")
    table.title, table.title_justify = "ROUGE-L, exact match and calibration error (ECE) in percent", "left"
    table.add_column("test set", overflow="fold")
    first, *others = (heading for heading, *_ in _COLUMNS)
    for heading in (first, "95 %\ninterval", *others):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[str, list[list[float | None]]] = {}  # numbers of all sets, by the temperature after the first
    for name, evaluation in rows.items():
        for label, one in {"": evaluation, **_other_temperatures(evaluation)}.items():
            numbers = [number(one) for _, number, _ in _COLUMNS]
            if not one.is_text:
                groups.setdefault(label, []).append(numbers)
            sampled, *cells = _cells(numbers)
            if one.rouge_l is not None and one.rouge_l.std is not None:
                sampled += f" ± {one.rouge_l.std:.2f}"
            rouge = one.rouge_l or one.greedy_rouge_l
            interval = "-" if rouge is None else "{:.1f}–{:.1f}".format(*rouge.interval)
            table.add_row(label or name, sampled, interval, *cells)
    for label, group in groups.items():
        columns = [[number for number in column if number is not None] for column in zip(*group, strict=True)]
        if (most := max(map(len, columns), default=0)) > 1:
            if not label:
                table.add_section()
            sampled, *cells = _cells([fmean(column) if column else None for column in columns])
            table.add_row(label or f"mean of {most} sets", sampled, "", *cells)
    notes = [f"{name}: {_note(evaluation)}" for name, evaluation in rows.items()]
    signature = f"signature: {signature_line(next(iter(rows.values())).signature)}"
    table.caption = Text("\n".join([*notes, signature]))  # no markup
    return table


def signature_line(signature: Mapping[str, Any]) -> str:
    """Format what all test sets share, which is the signature without the data."""
    return ", ".join(f"{key} {_shown(value)}" for key, value in signature.items() if key not in ("data", "references"))


def _other_temperatures(evaluation: Evaluation) -> dict[str, Evaluation]:
    """Return an evaluation for each temperature after the first, by the label of its row, with its sampled scores only."""
    nothing: dict[str, Any] = dict.fromkeys(("greedy_rouge_l", "greedy_exact_match", "bits_per_byte"))
    found = evaluation.other_temperatures.items()
    return {f"  temperature {key}": replace(evaluation, **nothing, **vars(scores)) for key, scores in found}


def _cells(numbers: list[float | None]) -> list[str]:
    digits = (column[-1] for column in _COLUMNS)
    return ["-" if value is None else f"{value:.{count}f}" for value, count in zip(numbers, digits, strict=True)]


def _note(evaluation: Evaluation) -> str:
    """Say how many rows a set has, and why a number is missing or covers fewer rows."""
    notes = [f"{evaluation.num_examples} rows"]
    bits = evaluation.bits_per_byte
    if evaluation.is_text:
        notes.append("bits per byte without a prompt")
    elif evaluation.signature["references"] == "none":
        notes.append("no references: answers without scores (or name their column with --response)")
    elif bits is None:
        notes.append("bits per byte: no row has a response that fits")
    if bits is not None:
        if bits.num_examples < evaluation.num_examples:
            notes.append(f"bits per byte of {bits.num_examples} rows")
        if bits.num_truncated:
            notes.append(f"bits per byte: {bits.num_truncated} responses cut")
    return "; ".join(notes)
