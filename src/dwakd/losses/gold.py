"""GOLD: merge the tokens of equal text, compare shared tokens by JSD and all others by rank (TRL)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from dwakd.align.offsets import byte_groups, sum_by_group, tokens_per_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, forward_kl, head_loss
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import Columns, cross_entropy, log_total
from dwakd.losses.divergences import mixture, reverse_kl, sorted_difference
from dwakd.losses.options import MethodOptions, Rate, Temperature, Weight
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale


class GoldOptions(MethodOptions):
    needs_models = "pair"
    method: Literal["gold"] = "gold"
    beta: Rate = Field(0.5, description="Weight of the teacher in JSD, which is KL(t || s) for 0 and KL(s || t) for 1.")
    merge: Literal["bayesian", "observed"] = Field(
        "bayesian",
        description="bayesian takes the distribution of a group's last token and the probabilities of the tokens before it; "
        "observed, TRL's default, takes the distribution of the first token and the probabilities of those after it.",
    )
    matched_weight: Weight | None = Field(
        None,
        description="Weight w_m of `jsd`. By default the number of matched tokens, divided by the number of tokens that the "
        "teacher's head allows.",
    )
    unmatched_weight: Weight | None = Field(
        None, description="Weight w_u of `uld`. By default 1 - w_m. Set both weights or none."
    )
    temperature: Temperature = Field(
        1.0,
        description="Divides the logits of both models before merging. Only 1, as in TRL, gives exact probabilities.",
    )
    ce_weight: Weight = Field(0.0, description="Weight of the cross-entropy. TRL uses 0.")
    kd_weight: Weight = Field(1.0, description="Weight of the two other terms.")

    @model_validator(mode="after")
    def _both_weights_or_none(self) -> "GoldOptions":
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight must be set together or not at all")
        return self


class GoldLoss(DistillationLoss[GoldOptions]):
    """Merge the tokens that cover the same text on both sides, and compare the merged distributions.

        L = ce_weight CE + kd_weight sum_g (w_m JSD(t_g, s_g) + w_u |sort t_g - sort s_g|_1)

    A group g is the smallest pair of token spans that start and end at the same bytes. The merged distribution of a model is
    the distribution of one token of the group times the probabilities of the other tokens in the text; it does not sum to 1.
    The Jensen-Shannon divergence JSD is over the tokens with equal bytes in both vocabularies, the difference of the sorted
    probabilities over all others. Each group of an example has the same weight, and the weights of an example sum to its
    number of student tokens.

        JSD(t, s) = beta KL(t || m) + (1 - beta) KL(s || m),    m = beta t + (1 - beta) s

    Gradient: the student's hidden states and head, through the distribution and the probabilities of the other tokens.

    References:
        TRL, experimental GOLD (hybrid ULD loss). Unlike TRL, tokens match by their bytes in any tokenizer, and the end tokens
        match. "observed" takes the position that predicts the first token of the group, where TRL takes the next one.
        Probabilities are not clamped. If one side has no unmatched token, `uld` sums the other's unmatched probabilities.
    """

    options_type = GoldOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "jsd", "uld")
    student_ids: Tensor
    teacher_ids: Tensor
    student_rest: Tensor
    teacher_rest: Tensor

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        if pair.student_tokens == pair.teacher_tokens:  # also the padding of both heads
            common = torch.arange(min(pair.vocabularies))
            matched = pair.possible_pairs(common, common)
        else:
            matched = pair.shared_tokens()
        for name, ids, size in zip(("student", "teacher"), matched, pair.vocabularies, strict=True):
            rest = torch.ones(size, dtype=torch.bool).index_fill(0, ids, False)
            self.register_buffer(f"{name}_ids", ids, persistent=False)
            self.register_buffer(f"{name}_rest", rest.nonzero().squeeze(1), persistent=False)
        share = len(self.teacher_ids) / int(pair.teacher_head.num_possible)
        matched_weight, unmatched_weight = self.options.matched_weight, self.options.unmatched_weight
        self.matched_weight = share if matched_weight is None else matched_weight
        self.unmatched_weight = 1 - share if unmatched_weight is None else unmatched_weight

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        anchors = []
        for ids, is_last in ((groups.student, groups.student_last), (groups.teacher, groups.teacher_last)):
            is_first = torch.cat([is_last.new_ones(1), is_last[:-1]])
            anchors.append((ids, is_last if self.options.merge == "bayesian" else is_first))
        criterion = MergedGroups(
            self,
            Anchors(student.target_ids, *anchors[0]),
            Anchors(teacher.target_ids, *anchors[1]),
            tokens_per_group(groups, student.lengths, even=True),
            ce_weight,
        )
        return Terms.of(head_loss([head_rows(student), constant_rows(teacher)], criterion))


@dataclass(frozen=True)
class Anchors:
    """Groups of one side, and the anchor of each: the position whose distribution is used.

    Args:
        targets: the target token at each position.
        groups: the group of each position.
        is_anchor: whether the position is the anchor of its group.
    """

    targets: Int[Tensor, " tokens"]
    groups: Int[Tensor, " tokens"]
    is_anchor: Bool[Tensor, " tokens"]

    def merged(self, columns: Columns, tokens: slice, temperature: float) -> Float[Tensor, "vocab groups"]:
        """Log of each group's distribution: that of its anchor plus the log-probabilities of its other target tokens."""
        groups, rows = self.groups[tokens] - self.groups[tokens][0], self.is_anchor[tokens].nonzero().squeeze(1)
        total = log_total(columns, temperature)
        realised = columns.gather(0, self.targets[tokens][None]).squeeze(0) / temperature - total
        others = sum_by_group(realised, groups, len(rows)) - realised[rows]
        anchors = columns.index_select(1, rows)
        return (anchors if temperature == 1 else anchors / temperature) + (others - total[rows])


class MergedGroups(Criterion):
    """Compute `ce` at each student token, and `jsd` and `uld` as sums over the groups with these weights."""

    unit = "examples"

    def __init__(
        self,
        loss: GoldLoss,
        student: Anchors,
        teacher: Anchors,
        weights: Float[Tensor, " s_tokens"],
        ce_weight: float,
    ) -> None:
        kd_weight = loss.options.kd_weight
        super().__init__(
            {"ce": ce_weight, "jsd": kd_weight * loss.matched_weight, "uld": kd_weight * loss.unmatched_weight}
        )
        self.loss, self.student, self.teacher, self.group_weights = loss, student, teacher, weights

    def targets_by_side(self) -> dict[int, Tensor]:
        return {0: self.student.targets, 1: self.teacher.targets}

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        loss, options, rows = self.loss, self.loss.options, chunk.rows
        own, theirs = logits[0].t(), logits[1].detach().t()
        q = self.student.merged(own, rows[0], options.temperature)
        p = self.teacher.merged(theirs, rows[1], options.temperature)
        jsd = generalised_jsd(p[loss.teacher_ids].t(), q[loss.student_ids].t(), options.beta)
        uld = sorted_difference(p[loss.teacher_rest].t().exp(), q[loss.student_rest].t().exp())
        shares = self.group_weights[self.student.groups[rows[0]][self.student.is_anchor[rows[0]]]]
        ce = cross_entropy(own, self.student.targets[rows[0]])
        return {"ce": ce, "jsd": (shares * jsd).sum(), "uld": (shares * uld).sum()}


def generalised_jsd(
    log_p: Float[Tensor, "groups vocab"], log_q: Float[Tensor, "groups vocab"], beta: float
) -> Float[Tensor, " groups"]:
    """Compute JSD, where p is a constant. p and q need not sum to 1; the value is still at least 0."""
    if beta in (0.0, 1.0):
        return reverse_kl(log_p, log_q) if beta else forward_kl(log_p, log_q)
    with torch.no_grad():  # the derivatives of log m and of log q add up to 0
        mixed = mixture(log_p, log_q, beta)
        constant = forward_kl(log_p, mixed)
        ratio = (log_q - mixed).clamp_min(torch.finfo(log_q.dtype).min)  # 0 x -inf is NaN
    return beta * constant + (1 - beta) * (log_q.exp() * ratio).sum(-1)
