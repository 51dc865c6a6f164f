"""X-Token: project the student's probabilities to the teacher's vocabulary by a sparse matrix (arXiv 2605.21699)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.align.offsets import ByteGroups, byte_groups, tokens_per_group
from dwakd.align.projection import projection
from dwakd.align.vocab import stored
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, forward_kl, head_loss
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import Columns, cross_entropy, log_total
from dwakd.losses.options import Count, MethodOptions, Temperature, Weight
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import example_ids

EPSILON = 1e-10
"""Added to the projected probabilities, as in the published code: a teacher token without a counterpart has probability 0."""
RELAXED = 0.6
"""Least weight of a student token's first teacher token that counts as a match in H-KL."""


class XTokenOptions(MethodOptions):
    needs_models = "pair"
    method: Literal["x_token"] = "x_token"
    objective: Literal["p_kl", "h_kl"] = Field(
        "p_kl",
        description="p_kl projects the student's distribution to the teacher's vocabulary; h_kl compares matched tokens by KL "
        "and the others by rank, as GOLD does, with more matches. The paper uses h_kl if few tokens are unmatched.",
    )
    top_k: Count = Field(
        4, description="Maximum number of teacher tokens in a row of the projection matrix. The published guide uses 4."
    )
    vocab_topk: Count = Field(
        8192, description="In p_kl, only the teacher tokens with the largest logits in the example are compared."
    )
    uncommon_topk: Count = Field(8192, description="In h_kl, the maximum number of unmatched tokens that are compared.")
    temperature: Temperature = Field(
        1.0, description="Divides the logits of both models in the divergences, which are multiplied by its square."
    )
    ce_weight: Weight = Field(0.1, description="Weight of the cross-entropy.")
    kd_weight: Weight = Field(1.0, description="Weight of the other terms.")


class XTokenLoss(DistillationLoss[XTokenOptions]):
    """Compare the models over groups of tokens, with vocabularies that are connected by a projection matrix W.

        P-KL: L = ce_weight CE + kd_weight tau^2 sum_g KL(T_g || Q_g),       Q_g ~ mean_{i in g} W' p^s_i
        H-KL: L = ce_weight CE + kd_weight tau^2 sum_g (KL(T_g || S_g) over matched tokens + |sort T_g - sort S_g|_1)

    A group g is the smallest pair of token spans that start and end at the same bytes. T_g is the geometric mean of the
    teacher's distributions at the tokens of the group, and S_g that of the student's; these do not sum to 1. p_i^s is the
    student's distribution at temperature tau and W' the transpose of W (`align.projection`). In P-KL, both sides are
    restricted to the `vocab_topk` teacher tokens K with the largest logits in the example: the teacher's distributions and
    Q_g sum to 1 over K. In H-KL, a student token is matched with the first teacher token of its row of W if the weight is at
    least 0.6; of several student tokens, the one with the largest weight and then the lowest id. The sorted probabilities of
    the unmatched tokens are compared up to the smaller of their numbers and `uncommon_topk`.

    Each group of an example has the same weight, and the weights of an example sum to its number of student tokens.

    Gradient: the student's hidden states and head.

    References:
        Sreenivas et al. 2026. Official code: NVIDIA-NeMo/RL, `CrossTokenizerDistillationLossFn`. The differences are listed in
        docs/methods/x_token.md.
    """

    options_type = XTokenOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd", "uncommon")
    targets: Int[Tensor, "s_vocab top_k"]
    weights: Float[Tensor, "s_vocab top_k"]
    common: Int[Tensor, "2 pairs"]
    student_rest: Int[Tensor, " ids"]
    teacher_rest: Int[Tensor, " others"]

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        tokens, shared, top_k = pair.possible_tokens(), pair.shared_tokens(), self.options.top_k

        def build() -> dict[str, Tensor]:
            return dict(zip(("ids", "weights"), projection(*tokens, shared, top_k, pair.spell), strict=True))

        content = [side.tolist() for side in shared], top_k, pair.spelling
        found = build() if pair.spell and not pair.spelling else stored(build, *tokens, *content)
        ids, weights = found["ids"], found["weights"]
        missing = pair.vocabularies[0] - len(ids)  # padding of the head
        ids, weights = (torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (ids, weights))
        self.register_buffer("targets", ids, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        common = relaxed_matches(ids[:, 0], weights[:, 0])
        self.register_buffer("common", common, persistent=False)
        for name, head, matched in zip(
            ("student", "teacher"), (pair.student_head, pair.teacher_head), common, strict=True
        ):
            rest = (~head.forbidden.cpu()).index_fill(0, matched, False).nonzero().squeeze(1)
            self.register_buffer(f"{name}_rest", rest, persistent=False)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        kind = ProjectedGroups if self.options.objective == "p_kl" else HybridGroups
        return Terms.of(
            head_loss([head_rows(student), constant_rows(teacher)], kind(self, student, teacher, groups, ce_weight))
        )


def relaxed_matches(ids: Int[Tensor, " s_vocab"], weights: Float[Tensor, " s_vocab"]) -> Int[Tensor, "2 pairs"]:
    """Return the matched tokens of H-KL (student, teacher), in the order of the student's ids."""
    best: dict[int, int] = {}
    for student in (weights >= RELAXED).nonzero().squeeze(1).tolist():
        teacher = int(ids[student])
        if teacher not in best or weights[student] > weights[best[teacher]]:
            best[teacher] = student
    pairs = sorted((student, teacher) for teacher, student in best.items())
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t()


class _Groups(Criterion):
    """Compute `ce` at each student token, and the other terms as sums over the groups."""

    unit = "examples"
    names: ClassVar[tuple[str, ...]]

    def __init__(
        self, loss: XTokenLoss, student: ModelSide, teacher: ModelSide, groups: ByteGroups, ce_weight: float
    ) -> None:
        options = loss.options
        super().__init__({"ce": ce_weight} | dict.fromkeys(self.names, options.kd_weight))
        self.loss, self.student, self.teacher, self.groups, self.tau = (
            loss,
            student,
            teacher,
            groups,
            options.temperature,
        )
        self.group_weights = tokens_per_group(groups, student.lengths, even=True) * self.tau**2

    def targets_by_side(self) -> dict[int, Tensor]:
        return {0: self.student.target_ids, 1: self.teacher.target_ids}

    def mean(self, columns: Columns, side: int, chunk: Chunk) -> Float[Tensor, "vocab groups"]:
        """Take the mean of the columns of each group of a chunk."""
        ids, last = ((self.groups.student, self.groups.student_last), (self.groups.teacher, self.groups.teacher_last))[
            side
        ]
        own = ids[chunk.rows[side]] - ids[chunk.rows[side]][0]
        count = len(last[chunk.rows[side]].nonzero())
        sums = columns.new_zeros(len(columns), count).index_add(1, own, columns)
        return sums / torch.bincount(own, minlength=count)

    def of_groups(self, logits: Sequence[Tensor], chunk: Chunk, **terms: Float[Tensor, " groups"]) -> dict[str, Tensor]:
        rows = chunk.rows[0]
        last = self.groups.student_last[rows]
        shares = self.group_weights[self.groups.student[rows][last]]
        sums = {name: (shares * value).sum() for name, value in terms.items()}
        return {"ce": cross_entropy(logits[0].t(), self.student.target_ids[rows]), **sums}


class ProjectedGroups(_Groups):
    """The terms of P-KL."""

    names = ("kd",)

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        own, theirs = (side.t() / self.tau for side in (logits[0], logits[1].detach()))
        outside = self.outside(theirs, chunk)
        target = self.mean(theirs.masked_fill(outside[0], -torch.inf).log_softmax(0), 1, chunk)
        probs = self.mean((own - log_total(own)).exp(), 0, chunk)
        projected = probs.new_zeros(len(theirs), probs.shape[1])
        for ids, factors in zip(self.loss.targets.t(), self.loss.weights.t(), strict=True):
            projected = projected.index_add(0, ids, factors[:, None].to(probs.dtype) * probs)
        projected = projected.masked_fill(outside[1], 0.0)
        log_q = (projected / (projected.sum(0) + EPSILON) + EPSILON).log()
        return self.of_groups(logits, chunk, kd=forward_kl(target.t(), log_q.t()))

    def outside(self, theirs: Columns, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return which teacher tokens are not compared, for each teacher token of the text and for each group."""
        rows = chunk.rows[1]
        lengths = self.teacher.lengths[chunk.examples]
        example = example_ids(lengths, theirs.shape[1])
        largest = theirs.new_full((len(theirs), len(lengths)), -torch.inf)
        largest = largest.scatter_reduce(1, example.expand_as(theirs), theirs, "amax")
        kept = largest.topk(min(self.loss.options.vocab_topk, len(theirs)), dim=0).indices
        outside = torch.ones_like(largest, dtype=torch.bool).scatter(0, kept, value=False)
        return outside[:, example], outside[:, example[self.groups.teacher_last[rows]]]


class HybridGroups(_Groups):
    """The terms of H-KL."""

    names = ("kd", "uncommon")

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        loss, means = self.loss, []
        for index, side in enumerate((logits[0].t(), logits[1].detach().t())):
            scaled = side / self.tau
            means.append(self.mean(scaled - log_total(scaled), index, chunk))
        kd = forward_kl(means[1][loss.common[1]].t(), means[0][loss.common[0]].t())
        rest = [means[0][loss.student_rest].exp(), means[1][loss.teacher_rest].exp()]
        ranks = min(loss.options.uncommon_topk, *map(len, rest))
        own, theirs = (side.topk(ranks, dim=0).values for side in rest)
        return self.of_groups(logits, chunk, kd=kd, uncommon=(own - theirs).abs().sum(0))
