"""Compare the representations of students and a teacher, whatever their tokenizers: the work of `dwakd similarity`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dwakd.align.offsets import byte_groups
from dwakd.data.encoded import EncodedRow
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import TEST_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.evaluate import data_identity, model_identity
from dwakd.evaluation.generate import Model, max_positions, progress_bar
from dwakd.evaluation.metrics import has_reference
from dwakd.evaluation.options import RowOptions
from dwakd.evaluation.run import load_for_evaluation, text_encoder_of
from dwakd.folders import check_output_folder, write_json
from dwakd.models.loading import check_vocabulary, load_tokenizer
from dwakd.models.rows import evaluating, response_hidden
from dwakd.recipe.files import RECIPE_FILE

Side: TypeAlias = tuple[Model, TextEncoder]
Structure = Float[Tensor, "spans spans"]
PLOT_WIDTH = 36


@dataclass(frozen=True)
class StructureDistances:
    """Mean absolute difference of the entries of student's and teacher's matrices, one value for each text."""

    cosine: list[float] = field(default_factory=list)  # of M_cos, from 0 to 2
    product: list[float] = field(default_factory=list)  # of M_prod, whose rows sum to 1
    num_spans: list[int] = field(default_factory=list)  # spans that both tokenisations share


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
        students: folders, hub ids or GGUF files; the same for `teacher`.
        data: file or hub id of prompts with responses.
        rows: how to read the rows and turn them into prompts; options that are None come from the recipes in the students'
            folders, if there are any.
        adapter: a PEFT adapter to merge into the teacher.
        output: JSON file for the signature and every value.

    Raises:
        UserError: a model or the data cannot be used, the recipes of the students differ in how rows become prompts, or the
            output file cannot be written.
    """
    if output is not None:
        check_output_folder(output.parent)
        if output.is_dir():
            raise UserError(f"{output} is a folder: name a JSON file with --output")
    examples = load_examples(data, split=TEST_SPLITS, **rows.reading())
    with_recipe = [name for name in students if (Path(name).expanduser() / RECIPE_FILE).is_file()]
    recipes = {name: name if name in with_recipe else next(iter(with_recipe), name) for name in students}
    encoders = {name: text_encoder_of(name, rows, recipe_of=recipe) for name, recipe in recipes.items()}
    prompts = {}
    for option in ("template", "bos", "special_tokens_in_prompts", "date"):
        prompts[option], *others = dict.fromkeys(getattr(encoder, option) for encoder in encoders.values())
        if others:
            name = {"date": "template_date"}.get(option, option)
            fix = "compare them one by one" if option == "date" else f"choose one with --{option.replace('_', '-')}"
            raise UserError(f"the recipes of the students differ in data.{name}: {fix}")

    def load(name: str, encoder: TextEncoder, adapter: str | None = None) -> Side:
        model = load_for_evaluation(name, adapter=adapter)
        check_vocabulary(model, encoder.tokenizer, name)
        return model, encoder

    reference = load(teacher, TextEncoder(load_tokenizer(teacher), **prompts), adapter)
    versions = {name: version(name) for name in ("dwakd", "torch", "transformers")}
    found: dict[str, Any] = {}
    for name in students:
        student = load(name, encoders[name])
        distances = structure_distances(student, reference, examples, max_length=max_length, source=data)
        found[name] = {"model": model_identity(student[0], name), **asdict(distances)}
        del student  # before the next one is loaded
    if output is not None:
        record = {
            "signature": {
                **prompts,
                "max_length": max_length,
                "device": reference[0].device.type,
                "versions": versions,
            },
            "data": data_identity(examples, data),
            "teacher": model_identity(reference[0], teacher),
            "students": found,
        }
        write_json(output, record)
    num_texts = " or ".join(dict.fromkeys(str(len(one["cosine"])) for one in found.values()))
    return Group(
        _table("cosines between spans (M_cos)", {name: one["cosine"] for name, one in found.items()}),
        _table("normalised inner products (M_prod)", {name: one["product"] for name, one in found.items()}),
        f"{num_texts} texts; a smaller difference means that a student is more similar to the teacher",
    )


def structure_distances(
    student: Side, teacher: Side, examples: Sequence[Example], *, max_length: int = 512, source: str = "the examples"
) -> StructureDistances:
    """Compute the distances of the two models' matrices over each response.

    This is figure 3 of DWA-KD on spans of text instead of tokens. The final hidden states of the response are averaged
    over the spans between byte ends that both tokenisations have, so that h_i belongs to the same text on both sides.
    M_cos(i, j) = cos(h_i, h_j) and M_prod(i, j) = h_i.h_j / sum_k h_i.h_k. The published code feeds the student's token
    ids to the teacher, even if the teacher has another vocabulary.

    Args:
        student: the student and its encoder, which must use the same template as the teacher's.
        teacher: the teacher and its encoder.
        examples: rows without a response, or without room for one, are left out.
        max_length: most tokens of prompt and response on either side; the response is truncated by text.
        source: name of the rows in error messages.

    Raises:
        UserError: no row can be used, or hidden states are NaN or infinite.

    References:
        Vu et al. 2026, section 4.4 and appendix B, where the differences are summed instead of averaged.
    """
    answered = [example for example in examples if has_reference(example)]
    if not answered:
        raise UserError(f"{source}: no row has a response to compare representations of")
    models = student[0], teacher[0]
    length = min(max_length, *map(max_positions, models))
    pairs = encode_pairs(
        answered,
        student[1],
        teacher[1],
        max_length=length,
        max_prompt_length=length - 1,
        length_option="--max-length",
        invalid_rows="skip",
        source=source,
    )
    found = StructureDistances()
    with progress_bar(disable=False) as bar, evaluating(models[0]), evaluating(models[1]):
        for row in bar.track(pairs.rows, description="representations"):
            one, other = _pooled(row, models)
            found.cosine.append(float((cosine_structure(one) - cosine_structure(other)).abs().mean()))
            found.product.append(float((product_structure(one) - product_structure(other)).abs().mean()))
            found.num_spans.append(len(one))
    if not np.isfinite([*found.cosine, *found.product]).all():
        raise UserError("the hidden states of student or teacher contain NaN or inf: check the weights of the models")
    return found


def cosine_structure(hidden: Float[Tensor, "spans width"]) -> Structure:
    """Compute M_cos(i, j) = cos(h_i, h_j)."""
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return unit @ unit.T


def product_structure(hidden: Float[Tensor, "spans width"]) -> Structure:
    """Compute M_prod(i, j) = h_i.h_j / sum_k h_i.h_k."""
    products = hidden @ hidden.T
    return products / products.sum(-1, keepdim=True)


def _pooled(row: EncodedRow, models: tuple[Model, Model]) -> list[Float[Tensor, "spans width"]]:
    """Average the hidden states over every span that both tokenisations share, for student and teacher, in float64."""
    sides = (row.student, row.teachers[0])
    counts = [len(side.byte_ends) for side in sides]
    ends = [torch.from_numpy(side.byte_ends).long() for side in sides]
    groups = byte_groups(ends[0], torch.tensor(counts[:1]), ends[1], torch.tensor(counts[1:]))
    pooled = []
    for model, side, count, index in zip(models, sides, counts, (groups.student, groups.teacher), strict=True):
        ids = torch.from_numpy(side.ids[:-1]).long().to(model.device)
        hidden = response_hidden(model, [ids], [count])[0].cpu().double()
        sums = hidden.new_zeros(int(index[-1]) + 1, hidden.shape[1]).index_add(0, index, hidden)
        pooled.append(sums / index.bincount()[:, None])
    return pooled


def _table(title: str, values: dict[str, list[float]]) -> Table:
    """Return quartiles and a box plot for each student, on one scale from 0 to the largest 95th percentile."""
    top = max(float(np.percentile(row, 95)) for row in values.values())
    table = Table(box=box.HORIZONTALS, show_edge=False, title=f"difference of {title}", title_justify="left")
    table.add_column("student", overflow="fold")
    for heading in ("median", "quartiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"0 to {top:.3g}: 5th percentile, quartiles, 95th", no_wrap=True)
    for name, row in values.items():
        points = np.percentile(row, [5, 25, 50, 75, 95]).tolist()
        table.add_row(Text(name), f"{points[2]:.4f}", f"{points[1]:.4f}–{points[3]:.4f}", box_plot(points, top))
    return table


def box_plot(points: Sequence[float], top: float, width: int = PLOT_WIDTH) -> str:
    """Draw five ascending points as a line of characters on a scale from 0 to `top`."""
    low, first, median, third, high = (min(round(p / top * (width - 1)), width - 1) if top else 0 for p in points)
    line = [" "] * width
    line[low : high + 1] = "─" * (high + 1 - low)
    line[first : third + 1] = "▒" * (third + 1 - first)
    line[median] = "█"
    return "".join(line)
