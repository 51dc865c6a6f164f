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
from dwakd.kernels.head_loss import Chunk, Criterion, head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import cross_entropy, log_total
from dwakd.losses.divergences import jensen_shannon, sorted_difference
from dwakd.losses.options import MethodOptions, Rate, Temperature, Weight
from dwakd.losses.pair import ModelPair


class GoldOptions(MethodOptions):
    """Options of `GoldLoss`."""

    needs_models = "pair"

    method: Literal["gold"] = "gold"
    beta: Rate = Field(
        0.5,
        description="Weight of the teacher in the mixture m of JSD = beta KL(t || m) + (1 - beta) KL(s || m). At 0 the "
        "divergence is KL(t || s), at 1 it is KL(s || t).",
    )
    merge: Literal["bayesian", "observed"] = Field(
        "bayesian",
        description="'bayesian' takes the distribution of a group's last token and the probabilities of the tokens before it. "
        "'observed', TRL's default, takes the distribution of the first token and the probabilities of those "
        "after it.",
    )
    matched_weight: Weight | None = Field(
        None,
        description="Weight w_m of `jsd`. By default the share of the teacher's vocabulary that is matched, without tokens "
        "that the head forbids.",
    )
    unmatched_weight: Weight | None = Field(
        None, description="Weight w_u of `uld`. By default 1 - w_m. Set both weights or none."
    )
    temperature: Temperature = Field(
        1.0,
        description="Divides the logits of both models before merging. TRL uses 1, the only value at which the product of "
        "probabilities is the probability of the group.",
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

    Gradient: the student's hidden states and head, through the distribution and the probabilities of the other tokens.

    Args:
        pair: vocabularies and heads of the two models.

    References:
        TRL, experimental GOLD (hybrid ULD loss), for the answers of a data set. Unlike TRL, tokens match by their bytes in
        any tokenizer, and the end tokens match. "observed" takes the position that predicts the first token of the group,
        where TRL takes the next one. Probabilities are not clamped. If one side has no unmatched token, `uld` is the sum of
        the other side's unmatched probabilities.
    """

    options_type = GoldOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "jsd", "uld")
    student_ids: Int[Tensor, " overlap"]
    teacher_ids: Int[Tensor, " overlap"]
    student_rest: Int[Tensor, " s_rest"]
    teacher_rest: Int[Tensor, " t_rest"]

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        self._match(pair)
        share = len(self.teacher_ids) / int(pair.teacher_head.num_possible)
        matched, unmatched = self.options.matched_weight, self.options.unmatched_weight
        self.matched_weight = share if matched is None else matched
        self.unmatched_weight = 1 - share if unmatched is None else unmatched

    def _match(self, pair: ModelPair) -> None:
        sizes = pair.vocabularies
        if pair.student_tokens == pair.teacher_tokens:  # the padding of both heads too
            matched = pair.possible_pairs(torch.arange(min(sizes)), torch.arange(min(sizes)))
        else:
            matched = pair.shared_tokens()
        for name, ids, size in zip(("student", "teacher"), matched, sizes, strict=True):
            rest = torch.ones(size, dtype=torch.bool).index_fill(0, ids, False)
            self.register_buffer(f"{name}_ids", ids, persistent=False)
            self.register_buffer(f"{name}_rest", rest.nonzero().squeeze(1), persistent=False)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        last = self.options.merge == "bayesian"
        anchors = (
            Anchors.of(student, groups.student, groups.student_last, last=last),
            Anchors.of(teacher, groups.teacher, groups.teacher_last, last=last),
        )
        criterion = MergedGroups(self, anchors, tokens_per_group(groups, student.lengths, even=True))
        output = head_loss([head_rows(student), constant_rows(teacher)], criterion)
        return Terms(output.terms, output.loss)


@dataclass(frozen=True)
class Anchors:
    """Groups of one side, and the anchor of each: the position whose distribution is used.

    Args:
        targets: the target token at each position.
        groups: the group of each position.
        rows: the anchor of each group.
        bounds: the first group of each example, followed by the number of groups.
    """

    targets: Int[Tensor, " tokens"]
    groups: Int[Tensor, " tokens"]
    rows: Int[Tensor, " groups"]
    bounds: list[int]

    @classmethod
    def of(
        cls, side: ModelSide, groups: Int[Tensor, " tokens"], is_last: Bool[Tensor, " tokens"], *, last: bool
    ) -> "Anchors":
        """Take the last token of each group as its anchor, or the first."""
        anchors = is_last if last else torch.cat([is_last.new_ones(1), is_last[:-1]])
        bounds = [0, *(groups[side.lengths.cumsum(0) - 1] + 1).tolist()]
        return cls(side.target_ids, groups, anchors.nonzero().squeeze(1), bounds)

    def merged(
        self, columns: Float[Tensor, "vocab tokens"], chunk: Chunk, side: int, temperature: float
    ) -> Float[Tensor, "vocab groups"]:
        """Log of each group's distribution: that of its anchor plus the log-probabilities of its other target tokens."""
        assert chunk.examples is not None
        tokens, groups = chunk.rows[side], slice(self.bounds[chunk.examples.start], self.bounds[chunk.examples.stop])
        rows = self.rows[groups] - tokens.start
        total = log_total(columns, temperature)
        realised = columns.gather(0, self.targets[tokens][None]).squeeze(0) / temperature - total
        others = sum_by_group(realised, self.groups[tokens] - groups.start, len(rows)) - realised[rows]
        anchors = columns[:, rows]
        return (anchors if temperature == 1 else anchors / temperature) + (others - total[rows])


class MergedGroups(Criterion):
    """Compute `ce` at each student token, and `jsd` and `uld` as weighted sums over the groups.

    Args:
        loss: the loss, with its options and the matched and unmatched tokens.
        anchors: groups of the student's and of the teacher's tokens.
        weights: weight of each group.
    """

    unit = "examples"

    def __init__(self, loss: GoldLoss, anchors: tuple[Anchors, Anchors], weights: Float[Tensor, " s_tokens"]) -> None:
        kd_weight = loss.options.kd_weight
        super().__init__(
            {
                "ce": loss.options.ce_weight,
                "jsd": kd_weight * loss.matched_weight,
                "uld": kd_weight * loss.unmatched_weight,
            }
        )
        self.loss, self.anchors, self.group_weights = loss, anchors, weights

    def targets_by_side(self) -> dict[int, Tensor]:
        return {side: anchors.targets for side, anchors in enumerate(self.anchors)}

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        assert chunk.examples is not None
        student, loss, options = self.anchors[0], self.loss, self.loss.options
        columns = [logits[0].t(), logits[1].detach().t()]
        q, p = (
            anchors.merged(side, chunk, n, options.temperature)
            for n, (anchors, side) in enumerate(zip(self.anchors, columns, strict=True))
        )
        jsd = jensen_shannon(p[loss.teacher_ids].t(), q[loss.student_ids].t(), options.beta)
        uld = sorted_difference(p[loss.teacher_rest].t().exp(), q[loss.student_rest].t().exp())
        shares = self.group_weights[student.bounds[chunk.examples.start] : student.bounds[chunk.examples.stop]]
        ce = cross_entropy(columns[0], student.targets[chunk.rows[0]])
        return {"ce": ce, "jsd": (shares * jsd).sum(), "uld": (shares * uld).sum()}
