"""Shrink a model on a data set and save the student: the work of `dwakd shrink`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from dwakd.data.prompts import Prompts
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, load_examples
from dwakd.evaluation.options import RowOptions
from dwakd.folders import check_output_folder
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.models.saving import save_causal_lm
from dwakd.tools.shrink.shrink import ShrinkReport, shrink_model

HELD_OUT = 64
"""Number of rows for bits per byte."""


def shrink_to_folder(
    model: str,
    data: str,
    output: Path,
    rows: RowOptions,
    *,
    vocab_size: int | None = None,
    num_layers: int | None = None,
    eval_data: str | None = None,
) -> Table:
    """Shrink a model on the text of a data set, save the student as a Hugging Face folder and return a report.

    Args:
        model: folder, hub id or GGUF file of the model.
        data: file or hub id of the text.
        output: folder of the student; must be empty or not exist.
        rows: how to read the rows and turn prompts into text.
        vocab_size: tokens of the new tokenizer; None keeps the old one.
        num_layers: layers to keep; None keeps all.
        eval_data: text on which bits per byte are measured. By default this is the last twentieth of `data`, which is
            then not used to train the tokenizer or to measure the influence of layers.

    Raises:
        UserError: the folder is not empty, or the model, the data or a size cannot be used.
    """
    check_output_folder(output, empty=True)
    tokenizer = load_tokenizer(model)
    prompts = Prompts(rows.template or "plain", tokenizer)

    def texts(source: str, split: Sequence[str]) -> list[str]:
        examples = load_examples(source, split=split, **rows.reading())
        return [prompts.render(example) + example.response for example in examples]

    train = texts(data, TRAIN_SPLITS)
    if eval_data is not None:
        held_out = texts(eval_data, EVAL_SPLITS)
    else:
        cut = max(len(train) - max(len(train) // 20, 1), 1)
        train, held_out = train[:cut], train[cut:]
    student, student_tokenizer, report = shrink_model(
        load_causal_lm(model),
        tokenizer,
        train,
        num_layers=num_layers,
        vocab_size=vocab_size,
        held_out=held_out[:HELD_OUT],
    )
    save_causal_lm(student, output)
    student_tokenizer.save_pretrained(output)
    return shrink_table(report, output)


def shrink_table(report: ShrinkReport, output: Path) -> Table:
    """Return a table of the sizes and bits per byte before and after."""
    table = Table("", "before", "after", title=f"student in {output}", title_justify="left")
    num_layers = len(report.block_influence or report.kept_layers)
    table.add_row("layers", str(num_layers), str(len(report.kept_layers)))
    table.add_row("vocabulary", f"{report.vocab_size_before:,}", f"{report.vocab_size_after:,}")
    table.add_row("parameters", f"{report.parameters_before:,}", f"{report.parameters_after:,}")
    bits = (report.bits_per_byte_before, report.bits_per_byte_after)
    table.add_row("bits per byte, untrained", *("-" if value is None else f"{value:.3f}" for value in bits))
    kept = set(report.kept_layers)
    notes = []
    if report.bits_per_byte_before is None:
        notes.append("bits per byte: the data has no row left to measure them on; name other text with --eval-data")
    if report.block_influence is not None:
        dropped = [f"{i} ({value:.2f})" for i, value in enumerate(report.block_influence) if i not in kept]
        notes.append(f"dropped layers, with their influence: {', '.join(dropped) or 'none'}")
    table.caption = "\n".join(notes)
    return table
