"""Cross-model attention (DSKD, arXiv 2406.17328; DWA-KD, equations 1 and 2) and its band (equations 19 to 22)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dwakd.batch import ModelSide
from dwakd.losses.pair import Widths
from dwakd.losses.sides import pad_rows, require_width, unpad_rows, valid


@dataclass(frozen=True)
class TeacherScale:
    """Statistics for the normalisation N(x) = x / std(x) of three teacher tensors, which can be merged over batches.

    Args:
        moments: number of values, mean and sum of squared deviations of each of the tensors: keys [e_j ; e_{j+1}], hidden
            states h_j and target embeddings e_{j+1}.
    """

    moments: Float[Tensor, "3 3"]

    @classmethod
    def of(cls, teacher: ModelSide) -> TeacherScale:
        """Compute the statistics over all response positions of one batch."""
        keys = torch.cat([teacher.input_embeddings, teacher.target_embeddings], -1)
        rows = []
        for part in (keys, teacher.hidden, teacher.target_embeddings):
            values = part.detach().double()
            mean = values.mean()
            rows.append(torch.stack([mean.new_tensor(values.numel()), mean, (values - mean).square().sum()]))
        return cls(torch.stack(rows))

    @staticmethod
    def merge(scales: list[TeacherScale]) -> TeacherScale:
        """Merge the statistics of several batches (Chan's parallel update)."""
        counts, means, deviations = torch.stack([scale.moments for scale in scales]).unbind(-1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total.clamp_min(1)
        squares = deviations.sum(0) + (counts * (means - mean).square()).sum(0)
        return TeacherScale(torch.stack([total, mean, squares], -1))

    @property
    def std(self) -> Float[Tensor, "3"]:
        """Standard deviations with Bessel's correction; 1 for a constant tensor."""
        count, _, squares = self.moments.unbind(-1)
        std = (squares / (count - 1).clamp_min(1)).sqrt()
        return torch.where(std > 0, std, 1.0)


class Projectors(nn.Module):
    """Linear maps with bias of DSKD and DWA-KD, for hidden widths d and embedding widths e of the two models.

        t2s: d_t -> d_s        query: 2 e_s -> 2 e_t, for attention
        s2t: d_s -> d_t        embedding_t2s: e_t -> e_s, for DWA-KD

    Raises:
        ValueError: `query` is created but the teacher's embeddings and hidden states have different widths, although
            attention adds them: V = t2s(N(h) + N(e)).
    """

    def __init__(self, widths: Widths, *, with_embedding: bool, with_query: bool = True) -> None:
        super().__init__()
        if with_query and widths.teacher_embedding != widths.teacher_hidden:
            raise ValueError(
                "cross-model attention adds the teacher's embeddings to its hidden states, but their widths are "
                f"{widths.teacher_embedding} and {widths.teacher_hidden}; choose another teacher"
            )
        if with_query:
            self.query = nn.Linear(2 * widths.student_embedding, 2 * widths.teacher_embedding)
        self.t2s = nn.Linear(widths.teacher_hidden, widths.student_hidden)
        self.s2t = nn.Linear(widths.student_hidden, widths.teacher_hidden)
        if with_embedding:
            self.embedding_t2s = nn.Linear(widths.teacher_embedding, widths.student_embedding)
        self.widths, self.with_embeddings = widths, with_embedding or with_query

    def require_fit(self, student: ModelSide, teacher: ModelSide) -> None:
        """Raise ValueError unless the widths of both sides fit the maps."""
        sides = (
            ("student", student, self.widths.student_hidden, self.widths.student_embedding),
            ("teacher", teacher, self.widths.teacher_hidden, self.widths.teacher_embedding),
        )
        for name, side, hidden, embedding in sides:
            require_width(side.hidden, hidden, f"{name}.hidden", "the projectors")
            if self.with_embeddings:
                for field in ("input_embeddings", "target_embeddings"):
                    require_width(getattr(side, field), embedding, f"{name}.{field}", "the projectors")


class CrossModelAttention(NamedTuple):
    """Result of `cross_model_attention`.

    Args:
        t2s_hidden: h^{t->s}, a projected teacher state for each student token. Gradient: query, t2s.
        s2t_hidden: h^{s->t}, a projected student state for each teacher token. Gradient: query, s2t, student hidden states.
        weights: attention weights A of equation 1, zero for padding. Gradient: query.
    """

    t2s_hidden: Float[Tensor, "s_tokens s_hidden"]
    s2t_hidden: Float[Tensor, "t_tokens t_hidden"]
    weights: Float[Tensor, "batch s_length t_length"]


def cross_model_attention(
    student: ModelSide, teacher: ModelSide, projectors: Projectors, scale: TeacherScale
) -> CrossModelAttention:
    """Project each model's states into the other's space and align them by attention (equations 1 and 2).

        h^{t->s} = softmax(Q K' / sqrt(2 d_t)) V,    softmax over teacher tokens
        h^{s->t} = softmax(K Q' / sqrt(2 d_t)) s2t(h^s),    softmax over student tokens

    with Q = query([e_i ; e_{i+1}]) of the student's detached embeddings, and K = N([e_j ; e_{j+1}]) and
    V = t2s(N(h_j) + N(e_{j+1})) of the teacher, which is a constant.
    """
    projectors.require_fit(student, teacher)
    dtype = projectors.query.weight.dtype
    key_std, hidden_std, target_std = scale.std.to(dtype)
    query = projectors.query(
        torch.cat([student.input_embeddings.detach(), student.target_embeddings.detach()], -1).to(dtype)
    )
    key = torch.cat([teacher.input_embeddings, teacher.target_embeddings], -1).detach().to(dtype) / key_std
    value = projectors.t2s(
        teacher.hidden.detach().to(dtype) / hidden_std + teacher.target_embeddings.detach().to(dtype) / target_std
    )
    back = projectors.s2t(student.hidden.to(dtype))

    s_length, t_length = max(student.counts), max(teacher.counts)
    queries = pad_rows(query, student.lengths, s_length)
    keys = pad_rows(key, teacher.lengths, t_length)
    scores = queries @ keys.transpose(1, 2) / math.sqrt(key.shape[-1])
    s_valid, t_valid = valid(student.lengths, s_length), valid(teacher.lengths, t_length)
    weights = scores.masked_fill(~t_valid[:, None, :], -torch.inf).softmax(-1)
    reverse = scores.masked_fill(~s_valid[:, :, None], -torch.inf).softmax(1).transpose(1, 2)
    t2s_hidden = weights @ pad_rows(value, teacher.lengths, t_length)
    s2t_hidden = reverse @ pad_rows(back, student.lengths, s_length)
    return CrossModelAttention(
        unpad_rows(t2s_hidden, student.lengths, student.hidden.shape[0]),
        unpad_rows(s2t_hidden, teacher.lengths, teacher.hidden.shape[0]),
        weights,
    )


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
    """Compute the penalty lambda_band [|j - c_i| > w_i] on Soft-DTW costs outside a band around the attention; a constant.

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
    return penalty * outside.to(attention.dtype)
