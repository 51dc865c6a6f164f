"""Soft-DTW divergence between two token sequences, inside a band (DWA-KD, equations 17 to 24)."""

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.soft_dtw import Impl, soft_dtw
from dwakd.losses.options import MethodOptions, Positive, Rate, Skew, Softening, Weight
from dwakd.losses.record import record
from dwakd.losses.sides import pad_rows

Pair = tuple[Float[Tensor, "s_tokens _"], Float[Tensor, "t_tokens _"]]
Padded = Float[Tensor, "batch length _"]
Band = Float[Tensor, "batch s_length t_length"]


class DwaOptions(MethodOptions):
    """Options that DWA-KD and DWA-KDv2 share."""

    ce_weight: Weight = Field(0.5, description="Weight of the cross-entropy.")
    kd_weight: Weight = Field(0.5, description="Weight of the three token-level distillation terms.")
    dtw_weight: Weight = Field(0.2, description="Weight of the two Soft-DTW terms.")
    temperature: Softening = 2.0
    skew: Skew = 0.1
    entropy_weights: bool = Field(True, description="Whether w_i includes the student's entropy H(p^s_i).")
    gate: bool = Field(True, description="Whether w_i includes the projected teacher's largest probability.")
    teacher_weights: bool = Field(True, description="Whether KD^tea is weighted.")
    dtw_hidden: bool = Field(True, description="Whether to align the final hidden states.")
    dtw_embedding: bool = Field(True, description="Whether to align the target embeddings.")
    band: bool = Field(
        True, description="Whether costs outside the band are penalised; if not, nDTW is plain Soft-DTW."
    )
    band_base: Weight = Field(5.0, description="Half the width b of the band, in tokens.")
    band_blend: Rate = Field(
        0.7, description="How far (alpha) the centre of the band follows the alignment instead of the diagonal."
    )
    band_penalty: Weight = Field(1.0, description="Penalty lambda_band, added to each cost outside the band.")
    gamma: Positive = Field(2.0, description="Temperature of the soft minimum.")
    impl: Impl = Field("auto", description="Kernel of Soft-DTW; auto takes the fastest that is available.")

    @property
    def aligns_hidden(self) -> bool:
        return self.dtw_hidden and self.dtw_weight > 0

    @property
    def aligns_embedding(self) -> bool:
        return self.dtw_embedding and self.dtw_weight > 0


def unit_rows(
    rows: Float[Tensor, "tokens width"], lengths: Int[Tensor, " batch"], length: int
) -> Float[Tensor, "batch length width"]:
    """Scale vectors to length 1 and pad each example, in float32 or better. A zero vector stays zero."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    # such as an untrained padding token; an epsilon in the norm would make its gradient huge
    zero = (rows == 0).all(-1, keepdim=True)
    norm = torch.where(zero, torch.ones_like(rows), rows).norm(dim=-1, keepdim=True)
    return pad_rows(rows / torch.where(zero, 1.0, norm), lengths, length)


def soft_dtw_divergences(
    pairs: list[Pair],
    student_lengths: Int[Tensor, " batch"],
    teacher_lengths: Int[Tensor, " batch"],
    *,
    gamma: float,
    band: Band | None = None,
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
    """Compute the Soft-DTW terms that the options include, summed over the batch, in one kernel call.

    `hidden` and `embedding` are the teacher's hidden states and target embeddings in the student's space; None to leave a term
    out.
    """
    student, teacher = sides
    pairs = {"dtw_hidden": (student.hidden, hidden), "dtw_embedding": (student.target_embeddings, embedding)}
    known = {name: (own, theirs) for name, (own, theirs) in pairs.items() if theirs is not None}
    if not known:
        return {}
    record(sequence_terms=list(known))
    longest = max(*student.counts, *teacher.counts)
    lengths = student.lengths, teacher.lengths
    values = list(known.values())
    scores = soft_dtw_divergences(values, *lengths, gamma=gamma, band=band, longest=longest, impl=options.impl)
    return {name: score.sum() for name, score in zip(known, scores, strict=True)}


def _costs(offset: Float[Tensor, "#batch #n #m"], x: Padded, y: Padded) -> Padded:
    """Compute offset - cosine, for vectors of length 1."""
    return torch.baddbmm(offset, x, -y.transpose(1, 2))


def band_penalty(
    weights: Float[Tensor, "batch s_length t_length"],
    student_lengths: Int[Tensor, " batch"],
    teacher_lengths: Int[Tensor, " batch"],
    *,
    base: float = 5.0,
    entropy_factor: float = 2.0,
    blend: float | Float[Tensor, "batch s_length"] = 0.7,
    penalty: float = 1.0,
    first_index: int = 1,
) -> Float[Tensor, "batch s_length t_length"]:
    """Compute the penalty that is added to Soft-DTW costs outside a band around the attention; a constant.

    The band of student token i contains the teacher tokens j with |j - c_i| <= w_i, for its centre c_i and half-width w_i.

    Args:
        weights: attention weights A of equation 1; detached here.
        student_lengths: student tokens S of each example.
        teacher_lengths: teacher tokens T of each example.
        base: b, the half-width of the band without entropy.
        entropy_factor: beta, tokens of half-width per nat of the attention's entropy.
        blend: alpha, how far the centre follows the attention instead of the diagonal: one value, or one per token.
        penalty: lambda_band, added to each cell outside the band.
        first_index: index of the first token. 1 in the paper; 0 reproduces the published code.
    """
    attention = weights.detach()
    rows = torch.arange(attention.shape[1], device=attention.device) + first_index
    columns = (torch.arange(attention.shape[2], device=attention.device) + first_index).to(attention.dtype)
    slope = (teacher_lengths / student_lengths).to(attention.dtype)
    diagonal = rows * slope[:, None]  # this form of the centre is exact where attention and diagonal agree
    centre = diagonal + blend * (attention @ columns - diagonal)
    width = base + entropy_factor * torch.special.entr(attention).sum(-1)
    outside = (columns - centre[..., None]).abs() > width[..., None]
    record(outside_band=outside)
    return penalty * outside.to(attention.dtype)
