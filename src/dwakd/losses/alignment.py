"""Soft-DTW divergence between two token sequences, inside a band (DWA-KD, equations 17 to 24)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.soft_dtw import Impl, soft_dtw
from dwakd.losses.band import Band
from dwakd.losses.banded import Pair, banded_divergences, unit_vectors
from dwakd.losses.options import MethodOptions, Positive, Rate, Skew, Softening, Weight
from dwakd.losses.record import is_recording, record
from dwakd.losses.sides import LONG, is_long, pad_rows

Padded = Float[Tensor, "batch length _"]
Penalties = Float[Tensor, "batch s_length t_length"]
UNWEIGHTED = "dtw_border"
"""A term that is only logged, and has no weight in the loss."""
DTW_TERMS = ("dtw_hidden", "dtw_embedding", UNWEIGHTED)
"""Names of the terms of Soft-DTW: the divergences, and the mass on the border of the stored band, which has no weight."""
_AUTO_WIDTH = 512


class DwaOptions(MethodOptions):
    """Options that DWA-KD and DWA-KDv2 share."""

    ce_weight: Weight = Field(0.5, description="Weight of the cross-entropy.")
    kd_weight: Weight = Field(0.5, description="Weight of the three token-level distillation terms.")
    dtw_weight: Weight = Field(0.2, description="Weight of the two Soft-DTW terms.")
    temperature: Softening = 2.0
    skew: Skew = 0.1
    entropy_weights: bool = Field(True, description="Whether w_i includes the student's entropy H(p^s_i).")
    gate: bool = Field(True, description="Whether w_i includes the projected teacher's largest probability.")
    teacher_weights: bool = Field(True, description="Whether KD^tea is weighted by w_j.")
    dtw_hidden: bool = Field(True, description="Whether to align the final hidden states.")
    dtw_embedding: bool = Field(True, description="Whether to align the target embeddings.")
    band: bool = Field(
        True, description="Whether costs outside the band are penalised; if not, nDTW is plain Soft-DTW."
    )
    band_base: Weight = Field(5.0, description="Half the width b of the band, in tokens.")
    band_blend: Rate = Field(
        0.7, description="alpha: with 1, the band is centred on the alignment, with 0 on the diagonal."
    )
    band_penalty: Weight = Field(1.0, description="Penalty lambda_band, added to each cost outside the band.")
    gamma: Positive = Field(2.0, description="Temperature of the soft minimum.")
    impl: Impl = Field("auto", description="Kernel of Soft-DTW; auto takes the fastest that is available.")
    dtw_width: Annotated[int, Field(ge=8, le=1 << 20)] | Literal["auto", "full"] = Field(
        "auto",
        description="Columns of the Soft-DTW tables that are computed in each row, around the centre of the band. full "
        f"computes all. auto computes {_AUTO_WIDTH} if a response of the batch has more than {LONG:,} tokens, else all.",
    )
    dtw_max_border: Positive = Field(
        1e-5,
        description="If more of the expected alignment lies on the border of the computed columns, their number is doubled.",
    )

    @property
    def aligns_hidden(self) -> bool:
        return self.dtw_hidden and self.dtw_weight > 0

    @property
    def aligns_embedding(self) -> bool:
        return self.dtw_embedding and self.dtw_weight > 0


def unit_rows(
    rows: Float[Tensor, "tokens width"], lengths: Int[Tensor, " batch"], length: int
) -> Float[Tensor, "batch length width"]:
    """Scale vectors to length 1 and pad each example, in float32 or better. See `unit_vectors`."""
    return pad_rows(unit_vectors(rows), lengths, length)


def soft_dtw_divergences(
    pairs: list[Pair],
    student_lengths: Int[Tensor, " batch"],
    teacher_lengths: Int[Tensor, " batch"],
    *,
    gamma: float,
    band: Penalties | None = None,
    longest: int | None = None,
    impl: str = "auto",
) -> list[Float[Tensor, " batch"]]:
    """Compute the Soft-DTW divergence of each pair of sequences with cosine costs, all in one kernel call.

        nDTW(X, Y) = s(C~_XY) - (s(C_XX) + s(C_YY)) / 2

    Args:
        pairs: student vectors, and teacher vectors that are already in the student's space, both packed over the examples.
            Gradient flows to both.
        student_lengths: student tokens of each example.
        teacher_lengths: teacher tokens of each example.
        gamma: temperature of the soft minimum.
        band: penalty that is added to the cross costs only (equation 22); a constant.
        longest: the largest of the lengths. Without it, it is read from the device.
        impl: kernel of `soft_dtw`.

    Returns:
        One value per example, for each pair. It has an offset without gradient that depends on the two lengths: do not
        compare values of different examples and do not clamp them.
    """
    if longest is None:
        longest = int(torch.maximum(student_lengths.max(), teacher_lengths.max()))
    costs: list[Padded] = []
    for student_rows, teacher_rows in pairs:
        dtype = torch.promote_types(student_rows.dtype, teacher_rows.dtype)
        x = unit_rows(student_rows.to(dtype), student_lengths, longest)
        y = unit_rows(teacher_rows.to(dtype), teacher_lengths, longest)
        one = x.new_ones(1, 1, 1)
        offset = one
        if band is not None:
            offset = one + torch.nn.functional.pad(
                band.to(x.dtype), (0, longest - band.shape[2], 0, longest - band.shape[1])
            )
        costs += [_costs(offset, x, y), _costs(one, x, x.detach()), _costs(one, y, y.detach())]
    record(cross_costs=costs[::3], gamma=gamma)
    x_lengths = torch.cat([student_lengths, student_lengths, teacher_lengths]).repeat(len(pairs))
    y_lengths = torch.cat([teacher_lengths, student_lengths, teacher_lengths]).repeat(len(pairs))
    scores = soft_dtw(torch.cat(costs), gamma, x_lengths, y_lengths, impl=impl)
    cross, student_self, teacher_self = scores.reshape(len(pairs), 3, -1).unbind(1)
    own = student_self + teacher_self
    # The value contains half of each self term, the gradient all of it: the factors above are detached, and for a symmetric
    # cost the missing half of the gradient equals the other half.
    return list(cross - own + own.detach() / 2)


def sequence_terms(
    options: DwaOptions,
    sides: tuple[ModelSide, ModelSide],
    hidden: Tensor | None,
    embedding: Tensor | None,
    *,
    gamma: float,
    band: Band | None,
) -> dict[str, Float[Tensor, ""]]:
    """Compute the Soft-DTW terms that the options include, summed over the batch.

    `hidden` and `embedding` are the teacher's hidden states and target embeddings in the student's space; None to leave a term
    out. `dtw_border` is the mass on the border of the computed columns, times the number of student tokens of the example.
    """
    student, teacher = sides
    pairs = {"dtw_hidden": (student.hidden, hidden), "dtw_embedding": (student.target_embeddings, embedding)}
    known = {name: (own, theirs) for name, (own, theirs) in pairs.items() if theirs is not None}
    if not known:
        return {}
    record(sequence_terms=list(known))
    lengths, values, width = (student.lengths, teacher.lengths), list(known.values()), options.dtw_width
    if width == "auto":
        width = _AUTO_WIDTH if is_long(student, teacher) else "full"
    if width != "full" and not is_recording():
        scores, border = banded_divergences(
            values,
            (student.counts, teacher.counts),
            gamma=gamma,
            band=band,
            width=width,
            max_border=options.dtw_max_border,
            impl=options.impl,
        )
    else:
        longest = max(*student.counts, *teacher.counts)
        penalties = None if band is None else band.penalties(max(teacher.counts))
        scores = soft_dtw_divergences(values, *lengths, gamma=gamma, band=penalties, longest=longest, impl=options.impl)
        border = torch.zeros_like(scores[0])
    terms = {name: score.sum() for name, score in zip(known, scores, strict=True)}
    return {**terms, UNWEIGHTED: (border.detach() * student.lengths).sum()}


def dtw_weights(options: DwaOptions, names: Iterable[str]) -> dict[str, float]:
    """Return the weight in the loss of each Soft-DTW term; `dtw_border` has none."""
    return {name: options.dtw_weight for name in names if name != UNWEIGHTED}


def _costs(offset: Float[Tensor, "#batch #n #m"], x: Padded, y: Padded) -> Padded:
    """Compute offset - cosine, for vectors of length 1."""
    return torch.baddbmm(offset, x, -y.transpose(1, 2))
