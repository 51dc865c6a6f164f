"""Merged distributions of token groups, and their comparison across vocabularies (GOLD)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dwakd.align.offsets import sum_by_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, forward_kl
from dwakd.kernels.head_loss.statistics import blocks, peak_of, pick, shifted_exp, subtract_at
from dwakd.kernels.sorted_distance import sorted_distance
from dwakd.losses.divergences import mixture

PerGroup = Float[Tensor, " groups"]


@dataclass(frozen=True)
class Columns:
    """Token ids of one vocabulary, split into matched and unmatched ones.

    Args:
        matched: tokens with a counterpart in the other vocabulary, in the same order on both sides.
        rest: tokens without a counterpart.
    """

    matched: Int[Tensor, " overlap"]
    rest: Int[Tensor, " rest"]


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

    def within(self, chunk: Chunk, side: int) -> "Anchors":
        """Select a chunk of whole examples. Positions and groups are counted from the first of the chunk."""
        assert chunk.examples is not None
        rows, groups = chunk.rows[side], slice(self.bounds[chunk.examples.start], self.bounds[chunk.examples.stop])
        return Anchors(self.targets[rows], self.groups[rows] - groups.start, self.rows[groups] - rows.start, [])

    def merged(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "groups vocab"]:
        """Log of each group's distribution: that of its anchor plus the log-probabilities of its other target tokens."""
        normaliser = logits.logsumexp(-1)
        realised = logits.gather(1, self.targets[:, None]).squeeze(1) - normaliser
        others = sum_by_group(realised, self.groups, len(self.rows)) - realised[self.rows]
        return logits[self.rows] + (others - normaliser[self.rows])[:, None]


class MergedGroups(Criterion):
    """Compute `ce` at each student token, and `jsd` and `uld` as weighted sums over the groups.

    Args:
        student: groups of the student's tokens.
        teacher: the same groups of the teacher's tokens.
        student_columns: matched and unmatched tokens of the student's vocabulary.
        teacher_columns: matched and unmatched tokens of the teacher's vocabulary.
        weights: weight of each group.
        rates: weight of each term in the loss.
        beta: see `generalised_jsd`, where p is the teacher's distribution.
        temperature: divides the logits of both sides in `jsd` and `uld`.
    """

    unit = "examples"

    def __init__(
        self,
        student: Anchors,
        teacher: Anchors,
        student_columns: Columns,
        teacher_columns: Columns,
        weights: Float[Tensor, " s_tokens"],
        rates: dict[str, float],
        *,
        beta: float,
        temperature: float,
    ) -> None:
        super().__init__(rates)
        self.student, self.teacher = student, teacher
        self.student_columns, self.teacher_columns = student_columns, teacher_columns
        self.group_weights, self.beta, self.temperature = weights, beta, temperature

    def targets_by_side(self) -> dict[int, Tensor]:
        return {0: self.student.targets, 1: self.teacher.targets}

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        student, teacher = self.student.within(chunk, 0), self.teacher.within(chunk, 1)
        q = student.merged(logits[0] / self.temperature)
        p = teacher.merged(logits[1].detach() / self.temperature)
        jsd = generalised_jsd(p[:, self.teacher_columns.matched], q[:, self.student_columns.matched], self.beta)
        uld = sorted_difference(p[:, self.teacher_columns.rest].exp(), q[:, self.student_columns.rest].exp())
        shares = self._shares(chunk)
        return {
            "ce": torch.nn.functional.cross_entropy(logits[0], student.targets, reduction="none"),
            "jsd": (shares * jsd).sum(),
            "uld": (shares * uld).sum(),
        }

    def differentiate(
        self,
        logits: Sequence[Tensor],
        chunk: Chunk,
        statistics: dict[str, Tensor],
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        if self.temperature != 1.0 or self.beta in (0.0, 1.0):
            return super().differentiate(logits, chunk, statistics, weights, needs)
        student, teacher = self.student.within(chunk, 0), self.teacher.within(chunk, 1)
        own, theirs = Softmaxed.of(logits[0].t(), student), Softmaxed.of(logits[1].t(), teacher)
        anchors = torch.zeros_like(own.total).index_fill_(0, student.rows, 1.0)
        pair = MergedPair(own, theirs, teacher.rows[student.groups], student.groups)
        shares = anchors * self._shares(chunk)[student.groups]
        slopes = torch.empty_like(own.columns)
        jsd = pair.jsd(self.student_columns.matched, self.teacher_columns.matched, self.beta, slopes)
        uld = pair.uld(self.student_columns.rest, self.teacher_columns.rest, slopes)
        if needs[0]:
            slopes[self.student_columns.matched] *= self.rates["jsd"] * shares
            slopes[self.student_columns.rest] *= self.rates["uld"] * shares
            ce_rate = self.rates["ce"]
            upstream = sum_by_group(slopes.sum(0), student.groups, len(student.rows))[student.groups]
            own.columns.mul_((ce_rate - upstream) / own.total).add_(slopes)
            subtract_at(own.columns, student.targets, ce_rate - upstream * (1 - anchors))
        return {"ce": -own.realised, "jsd": (shares * jsd).sum(), "uld": (shares * uld).sum()}

    def _shares(self, chunk: Chunk) -> PerGroup:
        assert chunk.examples is not None
        bounds = self.student.bounds
        return self.group_weights[bounds[chunk.examples.start] : bounds[chunk.examples.stop]]


@dataclass(frozen=True)
class Softmaxed:
    """Logits (vocab, tokens) of one side, overwritten with exp(logit - peak), and their sums.

    Args:
        columns: exp(logit - peak).
        total: its sum over the vocabulary at each position.
        realised: log-probability of each target token.
        factors: for each group, the factor that turns its anchor's column into the merged distribution.
    """

    columns: Float[Tensor, "vocab tokens"]
    total: Float[Tensor, " tokens"]
    realised: Float[Tensor, " tokens"]
    factors: PerGroup

    @classmethod
    def of(cls, columns: Float[Tensor, "vocab tokens"], anchors: Anchors) -> "Softmaxed":
        peak = peak_of(columns)
        realised, total = pick(columns, anchors.targets) - peak, torch.zeros_like(peak)
        for block in blocks(columns):
            total += shifted_exp(columns[block], peak).sum(0)
        realised -= total.log()
        others = sum_by_group(realised, anchors.groups, len(anchors.rows)) - realised[anchors.rows]
        return cls(columns, total, realised, others.exp() / total[anchors.rows])


@dataclass(frozen=True)
class MergedPair:
    """The merged distributions of student and teacher at each student token. Only values at anchors are used.

    Args:
        own: the student's side.
        theirs: the teacher's side.
        anchors: the teacher's anchor of the same group, for each student token.
        groups: the group of each student token.
    """

    own: Softmaxed
    theirs: Softmaxed
    anchors: Int[Tensor, " s_tokens"]
    groups: Int[Tensor, " s_tokens"]

    def probs(self, own_ids: Tensor, their_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Merged probabilities (vocab, tokens) of some token ids, of the student and of the teacher."""
        q = self.own.columns.index_select(0, own_ids).mul_(self.own.factors[self.groups])
        p = self.theirs.columns.index_select(0, their_ids).index_select(1, self.anchors)
        return q, p.mul_(self.theirs.factors[self.groups])

    def jsd(self, own_ids: Tensor, their_ids: Tensor, beta: float, slopes: Tensor) -> Float[Tensor, " s_tokens"]:
        """`generalised_jsd` at each student token. Writes its derivative by log q into the rows `own_ids` of `slopes`."""
        value = torch.zeros_like(self.own.total)
        tiny = torch.finfo(slopes.dtype).tiny
        for block in blocks(slopes):
            q, p = self.probs(own_ids[block], their_ids[block])
            mixed = torch.lerp(q, p, beta).clamp_min_(tiny)
            value += beta * (p / mixed).clamp_min_(tiny).log_().mul_(p).sum(0)
            slope = (q / mixed).clamp_min_(tiny).log_().mul_(q).mul_(1 - beta)
            value += slope.sum(0)
            slopes.index_copy_(0, own_ids[block], slope)
        return value

    def uld(self, own_ids: Tensor, their_ids: Tensor, slopes: Tensor) -> Float[Tensor, " s_tokens"]:
        """`sorted_difference` at each student token. Writes its derivative by log q into the rows `own_ids` of `slopes`."""
        q, p = (probs.t().contiguous() for probs in self.probs(own_ids, their_ids))
        value, slope = sorted_distance(q, p)
        slopes.index_copy_(0, own_ids, slope.mul_(q).t())
        return value


def generalised_jsd(
    log_p: Float[Tensor, "groups vocab"], log_q: Float[Tensor, "groups vocab"], beta: float
) -> Float[Tensor, " groups"]:
    """Compute the generalised Jensen-Shannon divergence of each group.

        beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

    It is KL(p || q) for beta 0 and KL(q || p) for beta 1. p and q need not sum to 1. For 0 < beta < 1 the value is still at
    least 0 and grows with the difference of the two sums.
    """
    if beta in (0.0, 1.0):
        return forward_kl(log_q, log_p) if beta else forward_kl(log_p, log_q)
    mixed = mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, mixed) + (1 - beta) * forward_kl(log_q, mixed)


def sorted_difference(
    p: Float[Tensor, "groups p_vocab"], q: Float[Tensor, "groups q_vocab"]
) -> Float[Tensor, " groups"]:
    """Sum of |p - q| with both sorted in descending order; the shorter one is padded with zeros."""
    shared = min(p.shape[1], q.shape[1])
    tops = [side.topk(shared).values for side in (p, q)]
    beyond = [side.sum(-1) - top.sum(-1) for side, top in zip((p, q), tops, strict=True) if side.shape[1] > shared]
    return torch.stack([(tops[0] - tops[1]).abs().sum(-1), *beyond]).sum(0)
