"""Project the states of one model to the tokens of the other (DSKD, DWA-KD): alignment and values of the projection."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor

from dwakd.align.offsets import read_rows
from dwakd.batch import ModelSide
from dwakd.losses.attention import (
    CrossModelAttention,
    Focus,
    Projectors,
    cross_model_attention,
    teacher_values,
)
from dwakd.losses.options import MethodOptions
from dwakd.losses.pair import Widths
from dwakd.losses.record import is_recording, record
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import example_ids, pad_rows, positions

Alignment = Literal["attention", "causal_attention", "bytes", "position"]


class CrossingOptions(MethodOptions):
    """Options that DSKD and DWA-KD share."""

    needs_models = "widths"
    alignment: Alignment = Field(
        "attention",
        description="How the tokens of the two models are aligned. attention (paper) learns the alignment from the embeddings "
        "of the tokens read and of the targets. causal_attention learns it from the embeddings of the tokens read, and a token "
        "sees only tokens of the other model that have not read further in the text. bytes aligns tokens that start at the "
        "same byte; a token without such a counterpart is left out of the distillation terms.",
    )
    values: Literal["hidden_and_target", "hidden"] = Field(
        "hidden_and_target",
        description="What is projected into the student's space: the teacher's hidden state plus the embedding of the target "
        "(paper), from which the projected teacher can read the label, or the teacher's hidden state alone, which "
        "alignment position always uses.",
    )

    @property
    def supports_sampled(self) -> bool:
        return self.alignment == "position" or (self.values == "hidden" and self.alignment != "attention")

    @property
    def needs_given(self) -> bool:
        return True  # t2s_ce, which trains the map to the student's space, has no weight on sampled responses

    @model_validator(mode="after")
    def _check_values(self) -> "CrossingOptions":
        if self.alignment == "position" and "values" in self.model_fields_set:
            raise ValueError(
                f"values={self.values} has no effect with alignment=position, which projects hidden states alone: leave out "
                "values, or use another alignment"
            )
        return self

    def projectors(self, widths: Widths, *, with_embedding: bool) -> Projectors:
        """Create the maps that these options use."""
        parts = {"attention": 2, "causal_attention": 1}.get(self.alignment, 0)
        adds_targets = self.values == "hidden_and_target" and self.alignment != "position"
        return Projectors(widths, with_embedding=with_embedding, query_parts=parts, adds_targets=adds_targets)


def cross(
    options: CrossingOptions, student: ModelSide, teacher: ModelSide, projectors: Projectors, scale: TeacherScale
) -> CrossModelAttention:
    """Project each model's states into the other's space, one for each token of the other model."""
    with_targets = options.values == "hidden_and_target"
    if options.alignment in ("attention", "causal_attention"):
        causal = options.alignment == "causal_attention"
        return cross_model_attention(student, teacher, projectors, scale, causal=causal, with_targets=with_targets)
    projectors.require_fit(student, teacher)
    dtype = projectors.t2s.weight.dtype
    back = projectors.s2t(student.hidden.to(dtype))
    if options.alignment == "position":
        return CrossModelAttention(projectors.t2s(teacher.hidden.detach().to(dtype)), back)
    own, theirs = (student.byte_ends, student.lengths), (teacher.byte_ends, teacher.lengths)
    rows, student_kept = read_rows(*own, *theirs)
    back_rows, teacher_kept = read_rows(*theirs, *own)
    values = projectors.t2s(teacher_values(teacher, scale, dtype, with_targets=with_targets))
    if is_recording():
        record(attention=one_hot(rows, student, teacher))
    focus = focus_on(rows, student.lengths, teacher.lengths, max(student.counts))
    return CrossModelAttention(values[rows], back[back_rows], focus, student_kept, teacher_kept)


def focus_on(
    rows: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_lengths: Int[Tensor, " batch"],
    length: int,
) -> Focus:
    """Return the focus of student tokens that attend to one teacher token each; `rows` are in the packed batch."""
    first = (teacher_lengths.cumsum(0) - teacher_lengths)[example_ids(student_lengths, len(rows))]
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # bfloat16 rounds positions above 256
    centre = pad_rows((rows - first)[:, None], student_lengths, length)[..., 0].to(dtype)
    return Focus(centre, torch.zeros_like(centre))


def one_hot(
    rows: Int[Tensor, " s_tokens"], student: ModelSide, teacher: ModelSide
) -> Float[Tensor, "batch s_length t_length"]:
    """Return attention weights that are 1 at one teacher token for each student token; `rows` are in the packed batch."""
    examples = example_ids(student.lengths, len(rows))
    first = teacher.lengths.cumsum(0) - teacher.lengths
    weights = torch.zeros(len(student.lengths), max(student.counts), max(teacher.counts), device=rows.device)
    place = examples, positions(student.lengths, len(rows)), rows - first[examples]
    return weights.index_put(place, weights.new_ones(()))


def kept_weights(
    kept: Bool[Tensor, " tokens"] | None, gate_weights: Float[Tensor, " tokens"] | None
) -> Shaped[Tensor, " tokens"] | None:
    """Multiply the gate weights of several teachers by 0 at tokens that are left out."""
    return kept if gate_weights is None else gate_weights if kept is None else gate_weights * kept
