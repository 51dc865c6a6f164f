"""Load models and data, compare representations and show box plots: the work of `dwakd similarity`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import TEST_SPLITS, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.options import RowOptions
from dwakd.evaluation.signature import data_identity, make_signature, model_identity
from dwakd.folders import check_output_folder
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.models.rows import check_head
from dwakd.tools.similarity.similarity import StructureDistances, structure_distances

PLOT_WIDTH = 36


def compare_representations(
    students: Sequence[str],
    teacher: str,
    data: str,
    rows: RowOptions,
    *,
    adapter: str | None = None,
    max_length: int = 512,
    output: Path | None = None,
) -> Group:
    """Compare every student with the teacher on the same responses and return box plots to print.

    Args:
        students: folders, hub ids or GGUF files of the students.
        teacher: folder, hub id or GGUF file of the teacher.
        data: file or hub id of prompts with responses.
        rows: how to read the rows and turn them into prompts.
        adapter: a PEFT adapter to merge into the teacher.
        max_length: most tokens of prompt and response.
        output: JSON file for the signature and every value.

    Raises:
        UserError: a model or the data cannot be used, or the output file cannot be written.
    """
    if output is not None:
        check_output_folder(output.parent)
        if output.is_dir():
            raise UserError(f"{output} is a folder: name a JSON file with --output")
    examples = load_examples(data, split=TEST_SPLITS, **rows.reading())
    prompts = rows.rendering(template="alpaca", bos="auto", special_tokens_in_prompts="parse")
    reference = load_causal_lm(teacher, adapter=adapter), TextEncoder(load_tokenizer(teacher), **prompts)
    check_head(reference[0])
    found: dict[str, StructureDistances] = {}
    record: dict[str, Any] = {
        "signature": make_signature(**prompts, max_length=max_length),
        "data": data_identity(examples, data),
        "teacher": model_identity(reference[0], teacher),
        "students": {},
    }
    for name in students:
        student = load_causal_lm(name), TextEncoder(load_tokenizer(name), **prompts)
        check_head(student[0])
        found[name] = structure_distances(
            student, reference, examples, max_length=max_length, source=data, progress=True
        )
        record["students"][name] = {"model": model_identity(student[0], name), **dataclasses.asdict(found[name])}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    num_texts = " or ".join(str(size) for size in dict.fromkeys(len(one.cosine) for one in found.values()))
    tables = [
        _table(title, {name: getattr(distances, metric) for name, distances in found.items()})
        for metric, title in (("cosine", "M_cos"), ("product", "M_prod"))
    ]
    return Group(*tables, f"{num_texts} texts; a smaller distance means that a student is more similar to the teacher")


def _table(title: str, values: dict[str, Sequence[float]]) -> Table:
    """Return quartiles and a box plot for each student, on one scale from 0 to the largest 95th percentile."""
    top = max(float(np.percentile(row, 95)) for row in values.values())
    table = Table(box=box.HORIZONTALS, show_edge=False, title=f"distance of {title}", title_justify="left")
    table.add_column("student", overflow="fold")
    for heading in ("median", "quartiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"0 to {top:.3g}: 5th percentile, quartiles, 95th", no_wrap=True)
    for name, row in values.items():
        low, first, median, third, high = np.percentile(row, [5, 25, 50, 75, 95])
        table.add_row(
            name, f"{median:.4f}", f"{first:.4f}–{third:.4f}", box_plot((low, first, median, third, high), top)
        )
    return table


def box_plot(points: Sequence[float], top: float, width: int = PLOT_WIDTH) -> str:
    """Draw five ascending points as a line of characters on a scale from 0 to `top`."""
    low, first, median, third, high = (
        min(round(point / top * (width - 1)), width - 1) if top else 0 for point in points
    )
    line = [" "] * width
    line[low : high + 1] = "─" * (high + 1 - low)
    line[first : third + 1] = "▒" * (third + 1 - first)
    line[median] = "█"
    return "".join(line)
