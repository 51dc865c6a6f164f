"""Groups of tokens merged to one distribution each, and two of them compared across vocabularies (GOLD)."""

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
    """A head's columns.

    Args:
        matched: those with a counterpart, in the order of the other side's.
        rest: those without.
    """

    matched: Int[Tensor, " overlap"]
    rest: Int[Tensor, " rest"]


@dataclass(frozen=True)
class Anchors:
    """Where the groups of one side lie.

    Args:
        targets: one token per row.
        groups: of each row.
        rows: of each group, the row whose distribution is taken.
        bounds: the first group of each example, and their number.
    """

    targets: Int[Tensor, " tokens"]
    groups: Int[Tensor, " tokens"]
    rows: Int[Tensor, " groups"]
    bounds: list[int]

    @classmethod
    def of(
        cls, side: ModelSide, groups: Int[Tensor, " tokens"], is_last: Bool[Tensor, " tokens"], *, last: bool
    ) -> "Anchors":
        """The last row of each group, or the first."""
        anchors = is_last if last else torch.cat([is_last.new_ones(1), is_last[:-1]])
        bounds = [0, *(groups[side.lengths.cumsum(0) - 1] + 1).tolist()]
        return cls(side.target_ids, groups, anchors.nonzero().squeeze(1), bounds)

    def within(self, chunk: Chunk, side: int) -> "Anchors":
        """Those of a chunk of whole examples, counted from its first row and group."""
        assert chunk.examples is not None
        rows, groups = chunk.rows[side], slice(self.bounds[chunk.examples.start], self.bounds[chunk.examples.stop])
        return Anchors(self.targets[rows], self.groups[rows] - groups.start, self.rows[groups] - rows.start, [])

    def merged(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "groups vocab"]:
        """Log of each group's distribution: that of its anchor, plus what is realised on its other rows."""
        normaliser = logits.logsumexp(-1)
        realised = logits.gather(1, self.targets[:, None]).squeeze(1) - normaliser
        others = sum_by_group(realised, self.groups, len(self.rows)) - realised[self.rows]
        return logits[self.rows] + (others - normaliser[self.rows])[:, None]


class MergedGroups(Criterion):
    """Terms `ce` per student row; `jsd` and `uld` summed over the groups with their weights.

    Args:
        student: the groups of the student's rows.
        teacher: likewise; as many groups.
        student_columns: of its head.
        teacher_columns: likewise.
        weights: of the groups.
        rates: of the terms.
        beta: see `generalised_jsd`; the teacher is p.
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
    """Logits in columns that gave way to exp(logit - peak).

    Args:
        columns: those.
        total: their sum per row.
        realised: log-probability of each target.
        factors: of each group, what makes its anchor's column the merged distribution.
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
    """Each student row's merged distribution beside the teacher's of the same group; only anchors' rows count.

    Args:
        own: the student's.
        theirs: the teacher's.
        anchors: the teacher's row for each student row.
        groups: of each student row.
    """

    own: Softmaxed
    theirs: Softmaxed
    anchors: Int[Tensor, " s_tokens"]
    groups: Int[Tensor, " s_tokens"]

    def probs(self, own_ids: Tensor, their_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's probabilities of some tokens, in columns."""
        q = self.own.columns.index_select(0, own_ids).mul_(self.own.factors[self.groups])
        p = self.theirs.columns.index_select(0, their_ids).index_select(1, self.anchors)
        return q, p.mul_(self.theirs.factors[self.groups])

    def jsd(self, own_ids: Tensor, their_ids: Tensor, beta: float, slopes: Tensor) -> Float[Tensor, " s_tokens"]:
        """`generalised_jsd` of each row; its derivative by log q goes into the rows `own_ids` of the slopes."""
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
        """`sorted_difference` of each row; its derivative by log q goes into the rows `own_ids` of the slopes."""
        q, p = (probs.t().contiguous() for probs in self.probs(own_ids, their_ids))
        value, slope = sorted_distance(q, p)
        slopes.index_copy_(0, own_ids, slope.mul_(q).t())
        return value


def generalised_jsd(
    log_p: Float[Tensor, "groups vocab"], log_q: Float[Tensor, "groups vocab"], beta: float
) -> Float[Tensor, " groups"]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; KL(p || q) at 0 and KL(q || p) at 1.

    Of distributions that need not sum to 1: at least 0 for 0 < beta < 1 all the same, as it charges for unequal mass.
    """
    if beta in (0.0, 1.0):
        return forward_kl(log_q, log_p) if beta else forward_kl(log_p, log_q)
    mixed = mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, mixed) + (1 - beta) * forward_kl(log_q, mixed)


def sorted_difference(
    p: Float[Tensor, "groups p_vocab"], q: Float[Tensor, "groups q_vocab"]
) -> Float[Tensor, " groups"]:
    """Sum of |p - q|, both in falling order, the shorter continued by zeros."""
    shared = min(p.shape[1], q.shape[1])
    tops = [side.topk(shared).values for side in (p, q)]
    beyond = [side.sum(-1) - top.sum(-1) for side, top in zip((p, q), tops, strict=True) if side.shape[1] > shared]
    return torch.stack([(tops[0] - tops[1]).abs().sum(-1), *beyond]).sum(0)
