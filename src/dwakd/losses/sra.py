"""SRA: align the states of text spans in direction, geometry and next-token prediction (arXiv 2605.01205)."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from dwakd.align.offsets import byte_groups, sum_by_group, tokens_per_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import CrossEntropy, HeadRows, forward_kl, head_loss
from dwakd.losses.alignment import unit_rows
from dwakd.losses.base import DistillationLoss, Terms, head_rows
from dwakd.losses.divergences import compare_with_teacher
from dwakd.losses.options import MethodOptions, Rate, Softening, Weight
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import example_ids, pad_rows, require_width
from dwakd.losses.weights import rescale

LEAST_WEIGHT = 1e-30


class SraOptions(MethodOptions):
    needs_models = "pair"
    method: Literal["sra"] = "sra"
    kd_rate: Rate = Field(
        0.5, description="Weight r of the three distillation terms. The published scripts use 0.5; 0.4 for TinyLlama."
    )
    geo_weight: Weight = Field(50.0, description="Weight of L_geo. The paper uses 50.")
    temperature: Softening = 2.0
    span_weights: Literal["attention", "uniform"] = Field(
        "attention",
        description="attention (paper), or uniform: all tokens of a span weigh the same, and w_k is the span's fraction of "
        "the teacher's tokens. A teacher cache requires uniform, because it stores no attention.",
    )

    @property
    def needs_attention(self) -> bool:
        return self.span_weights == "attention"


class SraLoss(DistillationLoss[SraOptions]):
    """Compare the hidden states of text spans that both tokenisations share.

        L = (1 - r) CE + r (L_span + geo_weight L_geo + L_kd)

    r is the option `kd_rate`. A span k is the smallest pair of token spans that start and end at the same bytes. Its
    state s_k (student) or t_k (teacher) is a weighted mean of the final hidden states that predict its tokens. The
    weights are the attention from the last position of the response to these positions, in the last layer and summed
    over its heads. The span's weight w_k is its fraction of the teacher's attention to the response. Attention is a
    constant. P is the only learned map:

        L_span = sum_k w_k (1 - cos(P s_k, t_k))
        L_geo  = mean over pairs k != l, weighted by w_k w_l, of (cos(s_k, s_l) - cos(t_k, t_l))^2
        L_kd   = mean_k KL(p(t_k) || p(s_k)), each model's head on its own state, over tokens with equal bytes

    Each term is a mean over an example, which is then weighted by its student tokens. L_geo of a single span is 0.

    Gradient: the student's hidden states through all terms, P through L_span, the student's head through CE and L_kd.

    Raises:
        ValueError: the vocabularies share no token.

    References:
        Dao et al. 2026. Port: HoangTran223/ICARE. In all but the longest example of a batch it takes the attention of a
        padding position, its states are those that read a span's tokens, it divides sums over tokens and means over examples
        by the same number, its L_kd is a sum over spans, and it matches tokens as strings.
    """

    options_type = SraOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "span", "geo", "kd")
    student_ids: Int[Tensor, " overlap"]
    teacher_ids: Int[Tensor, " overlap"]

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        for name, ids in zip(("student_ids", "teacher_ids"), pair.needed_shared_tokens("sra"), strict=True):
            self.register_buffer(name, ids, persistent=False)
        self.projector = nn.Linear(pair.widths.student_hidden, pair.widths.teacher_hidden)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        require_width(student.hidden, self.projector.in_features, "student.hidden", "the projector")
        require_width(teacher.hidden, self.projector.out_features, "teacher.hidden", "the projector")
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        examples = example_ids(student.lengths, len(student.target_ids))
        lengths = sum_by_group(groups.student_last.long(), examples, len(student.lengths))  # spans
        size = int(lengths.sum())
        own, _ = pool(student.hidden, self._row_weights(student), groups.student, size)
        theirs, mass = pool(teacher.hidden.detach(), self._row_weights(teacher), groups.teacher, size)
        even = tokens_per_group(groups, student.lengths, even=True)[:size].to(theirs.dtype)
        weights = even * rescale(mass, lengths)  # the weights of an example sum to its number of student tokens

        projected = self.projector(own.to(self.projector.weight.dtype))
        cosines = nn.functional.cosine_similarity(projected, theirs, dim=-1)
        rate, ce = self.options.kd_rate, head_loss([head_rows(student)], CrossEntropy(student.target_ids, ce_weight))
        sides = [
            HeadRows(own, student.head.of_tokens(self.student_ids), lengths),
            HeadRows(theirs, teacher.head.detached().of_tokens(self.teacher_ids), lengths),
        ]
        kd = compare_with_teacher(sides, forward_kl, self.options.temperature, kd_weight=rate, token_weights=even)
        sums = {
            "span": (weights * (1 - cosines)).sum(),
            "geo": (student.lengths * gram_distance(own, theirs, weights, lengths)).sum(),
            "kd": kd.terms["kd"],
        }
        return Terms(ce.terms | sums, ce.loss + kd.loss, {"span": rate, "geo": rate * self.options.geo_weight})

    def _row_weights(self, side: ModelSide) -> Float[Tensor, " tokens"]:
        if not self.options.needs_attention:
            return side.hidden.new_ones(len(side.hidden))
        if side.attention is None:
            raise ValueError(
                "sra with span_weights=attention needs the attention of both sides; use span_weights=uniform"
            )
        return side.attention


def pool(
    hidden: Float[Tensor, "tokens hidden"],
    weights: Float[Tensor, " tokens"],
    groups: Int[Tensor, " tokens"],
    size: int,
) -> tuple[Float[Tensor, "{size} hidden"], Float[Tensor, " {size}"]]:
    """Compute the weighted mean of each span's hidden states, in float32 or better, and the sum of its weights.

    It is differentiable. If all weights of a span are 0, as outside a sliding attention window, they count as equal.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = weights.to(dtype).clamp_min(LEAST_WEIGHT)
    mass = sum_by_group(weights, groups, size)
    rows = hidden.to(dtype) * (weights / mass[groups])[:, None]
    return rows.new_zeros(size, rows.shape[1]).index_add(0, groups, rows), mass


def gram_distance(
    student: Float[Tensor, "spans s_hidden"],
    teacher: Float[Tensor, "spans t_hidden"],
    weights: Float[Tensor, " spans"],
    lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Compute the weighted mean of (cos(s_k, s_l) - cos(t_k, t_l))^2 over the pairs of spans of each example.

    The weight of a pair is the product of the weights of its spans. The value of an example with a single span is 0.
    """
    longest = int(lengths.max())
    own, theirs = (
        rows @ rows.transpose(1, 2) for rows in (unit_rows(side, lengths, longest) for side in (student, teacher))
    )
    padded = pad_rows(weights[:, None], lengths, longest)
    pairs = (padded @ padded.transpose(1, 2)).tril(-1)
    total = pairs.sum((1, 2))
    return (pairs * (own - theirs).square()).sum((1, 2)) / torch.where(total > 0, total, 1.0)
