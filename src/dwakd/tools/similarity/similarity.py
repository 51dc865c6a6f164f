"""Compare the representations of a student and a teacher with different tokenizers, by their relations within a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from dwakd.align.offsets import byte_groups
from dwakd.batch import ModelSide
from dwakd.data.collator import PairedCollator
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.generate import max_positions, pad_id_of, progress_bar
from dwakd.models.rows import evaluating, response_rows

Model: TypeAlias = PreTrainedModel | PeftModel
Structure = Float[Tensor, "spans spans"]


@dataclass(frozen=True)
class StructureDistances:
    """Distances between the matrices of student and teacher, one value for each text.

    A distance is the mean absolute difference of the entries of two matrices.

    Args:
        cosine: distances of M_cos, from 0 to 2.
        product: distances of M_prod, whose rows sum to 1.
        num_spans: number of spans of each text that both tokenisations share.
    """

    cosine: tuple[float, ...]
    product: tuple[float, ...]
    num_spans: tuple[int, ...]


def structure_distances(
    student: tuple[Model, TextEncoder],
    teacher: tuple[Model, TextEncoder],
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    source: str = "the examples",
    progress: bool = False,
) -> StructureDistances:
    """Compute the distances of the two models' matrices over each response.

    This is figure 3 of DWA-KD on spans of text instead of tokens. The final hidden states of the response are averaged
    over the spans between byte ends that both tokenisations have, so that h_i belongs to the same text on both sides.
    M_cos(i, j) = cos(h_i, h_j) and M_prod(i, j) = h_i.h_j / sum_k h_i.h_k. The published code feeds the student's token
    ids to the teacher, even if the teacher has another vocabulary.

    Args:
        student: the student and its encoder.
        teacher: the teacher and its encoder, which must use the same template.
        examples: rows with a response; rows without one, or without room for it, are left out.
        batch_size: texts in one forward pass.
        max_length: most tokens of prompt and response on either side; the response is cut by text.
        source: name of the rows in error messages.
        progress: show a progress bar on standard error.

    Raises:
        UserError: no row can be used, or hidden states are NaN or infinite.

    References:
        Vu et al. 2026, section 4.4 and appendix B, where the differences are summed instead of averaged.
    """
    answered = [example for example in examples if example.response.strip()]
    if not answered:
        raise UserError(f"{source}: no row has a response to compare representations of")
    length = min(max_length, max_positions(student[0]) or max_length, max_positions(teacher[0]) or max_length)
    pairs = encode_pairs(
        answered,
        student[1],
        teacher[1],
        max_length=length,
        max_prompt_length=length - 1,
        invalid_rows="skip",
        source=source,
        length_option="--max-length",
        mend="raise --max-length, if the models have more positions, or shorten its rows",
    )
    collator = PairedCollator(pad_id_of(student[1]), pad_id_of(teacher[1]))
    loader = DataLoader(pairs, batch_size=batch_size, collate_fn=collator)
    cosine: list[float] = []
    product: list[float] = []
    spans: list[int] = []
    with progress_bar(disable=not progress) as bar, evaluating(student[0]), evaluating(teacher[0]), torch.no_grad():
        task = bar.add_task("representations", total=len(loader))
        for batch in loader:
            for one, other in zip(*_pooled(batch, student[0], teacher[0]), strict=True):
                cosine.append(float((cosine_structure(one) - cosine_structure(other)).abs().mean()))
                product.append(float((product_structure(one) - product_structure(other)).abs().mean()))
                spans.append(len(one))
            bar.advance(task)
    if not np.isfinite([*cosine, *product]).all():
        raise UserError("the hidden states of student or teacher contain NaN or inf: check the weights of the models")
    return StructureDistances(tuple(cosine), tuple(product), tuple(spans))


def cosine_structure(hidden: Float[Tensor, "spans width"]) -> Structure:
    """Compute M_cos(i, j) = cos(h_i, h_j)."""
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return unit @ unit.T


def product_structure(hidden: Float[Tensor, "spans width"]) -> Structure:
    """Compute M_prod(i, j) = h_i.h_j / sum_k h_i.h_k."""
    products = hidden @ hidden.T
    return products / products.sum(-1, keepdim=True)


def _pooled(batch: dict[str, Tensor], student: Model, teacher: Model) -> tuple[list[Tensor], list[Tensor]]:
    """Average the hidden states over every shared span of each text, for student and teacher, in float64."""
    sides: list[ModelSide] = []
    for name, model in (("student", student), ("teacher", teacher)):
        keys = ("input_ids", "attention_mask", "target_ids", "response_mask", "byte_ends")
        sides.append(response_rows(model, *(batch[f"{name}_{key}"].to(model.device) for key in keys)))
    ends: list[Any] = [part.cpu() for side in sides for part in (side.byte_ends, side.lengths)]
    groups = byte_groups(*ends)
    per_text = _groups_per_text(groups.student, ends[1])
    pooled = []
    for side, index in zip(sides, (groups.student, groups.teacher), strict=True):
        rows = side.hidden.double().cpu()
        size = int(index[-1]) + 1
        sums = rows.new_zeros(size, rows.shape[1]).index_add(0, index, rows)
        pooled.append(list((sums / index.bincount(minlength=size)[:, None]).split(per_text)))  # type: ignore[no-untyped-call]
    return pooled[0], pooled[1]


def _groups_per_text(groups: Tensor, lengths: Tensor) -> list[int]:
    last = groups[lengths.cumsum(0) - 1] + 1
    return torch.diff(last, prepend=last.new_zeros(1)).tolist()
