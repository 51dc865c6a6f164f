"""Distil in the student's and in the teacher's output space (DSKD, DWA-KD), with two sides that share a head."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from dwakd.kernels.head_loss.criterion import Chunk, Criterion, Sides, Statistics
from dwakd.kernels.head_loss.statistics import SoftenedPair, entropy, forward_kl, pick, subtract_at

Weigh = Callable[[Statistics, Any], Float[Tensor, " tokens"]]


class StudentSpace(Criterion):
    """Compute the loss terms in the student's output space from the student's and the projected teacher's logits.

    The terms are the cross-entropies `ce` of the student and `t2s_ce` of the projected teacher, and the divergence
    `kd_student` = weight x D(p^{t->s} || p^s). D treats the projected distribution as a constant, which is trained by
    its own cross-entropy.

    The statistics, at temperature 1, are `entropy` = H(p^s), `gate` = max p^{t->s}, `right` (whether the most probable
    projected token is its target) and `projected_weight`.

    Args:
        targets: token id of each position.
        temperature: divides the logits of both sides in D.
        rates: factor of each term in the loss.
        divergence: D of each token, as a function of log-probabilities (target, learned).
        weigh: computes the weights from the statistics and the lengths; the weights are 1 by default.
        whole_examples: whether `weigh` needs whole examples.
        projected_targets: targets of the projected side in `t2s_ce` and `right`; the student's targets by default.
        projected_weights: constant factor of each token's `t2s_ce`; 1 by default.
        token_weights: constant factor of each token's `kd_student`, applied after `weigh`; 1 by default.
    """

    def __init__(
        self,
        targets: Int[Tensor, " tokens"],
        temperature: float,
        rates: dict[str, float],
        *,
        divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl,
        weigh: Weigh | None = None,
        whole_examples: bool = False,
        projected_targets: Int[Tensor, " tokens"] | None = None,
        projected_weights: Shaped[Tensor, " tokens"] | None = None,
        token_weights: Shaped[Tensor, " tokens"] | None = None,
    ) -> None:
        super().__init__(rates)
        self.unit = "weights" if whole_examples else "rows"
        self.targets, self.temperature = targets, temperature
        self.projected_targets = targets if projected_targets is None else projected_targets
        ones = torch.ones_like(targets, dtype=torch.bool)  # True is 1 in products of any dtype
        self.projected_weights = ones if projected_weights is None else projected_weights
        self.token_weights = ones if token_weights is None else token_weights
        self.divergence, self.weigh = divergence, weigh

    def targets_by_side(self) -> dict[int, Tensor]:
        return {0: self.targets, 1: self.projected_targets}

    def terms(self, logits: Sides, chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        rows, (own, projected) = chunk.rows[0], logits
        ce = cross_entropy(own, self.targets[rows], reduction="none")
        t2s_ce = cross_entropy(projected, self.projected_targets[rows], reduction="none")
        softened = [(side / self.temperature).log_softmax(-1) for side in (projected.detach(), own)]
        kd = self.divergence(*softened) * (
            self.token_weights[rows] if weights is None else weights * self.token_weights[rows]
        )
        return {"ce": ce, "t2s_ce": t2s_ce * self.projected_weights[rows], "kd_student": kd}

    def statistics(self, logits: Sides, chunk: Chunk) -> Statistics:
        if self.weigh is None:
            return {}
        own, projected = (side.log_softmax(-1) for side in logits)
        peak = projected.amax(-1)
        chosen = projected.gather(-1, self.projected_targets[chunk.rows[1]][:, None]).squeeze(-1)
        given = self.projected_weights[chunk.rows[1]]
        return {"entropy": entropy(own), "gate": peak.exp(), "right": chosen == peak, "projected_weight": given}

    def weights(self, statistics: Statistics, lengths: Int[Tensor, " batch"] | None) -> Tensor | None:
        return None if self.weigh is None else self.weigh(statistics, lengths)


class ForwardKlSpace(StudentSpace):
    """`StudentSpace` with D = KL(p^{t->s} || p^s) and a hand-written gradient: the default of DWA-KD and DSKD."""

    def observe(self, logits: Sides, chunk: Chunk) -> Statistics:
        own, projected = (side.t() for side in logits)
        chosen = pick(own, self.targets[chunk.rows[0]]), pick(projected, self.projected_targets[chunk.rows[1]])
        pair = SoftenedPair(self.temperature)
        mine, theirs, kl = pair.observe(own, projected, entropy_of=own, totals_of=(own, projected))
        return {
            "entropy": mine.entropy(),
            "gate": theirs.total.reciprocal(),
            "right": chosen[1] == theirs.peak,
            "ce": mine.total.log() + mine.peak - chosen[0],
            "t2s_ce": theirs.total.log() + theirs.peak - chosen[1],
            "kl": kl,
            "own_total": mine.total,
            "own_soft_total": mine.soft_total,
            "projected_total": theirs.total,
            "projected_soft_total": theirs.soft_total,
            "projected_weight": self.projected_weights[chunk.rows[1]],
        }

    def differentiate(
        self, logits: Sides, chunk: Chunk, statistics: Statistics, weights: Tensor | None, needs: Sequence[bool]
    ) -> dict[str, Tensor]:
        rows, kl = chunk.rows[0], statistics["kl"]
        weighted = torch.ones_like(kl) * self.token_weights[rows]
        weighted = weighted if weights is None else weights * weighted
        if any(needs):
            own, projected = (side.t() for side in logits)
            kd = weighted * (self.rates["kd_student"] / self.temperature)
            own_rate = torch.full_like(kl, self.rates["ce"])
            projected_rate = torch.full_like(kl, self.rates["t2s_ce"]) * self.projected_weights[rows]
            factors = {"own_soft": kd, "projected_soft": kd, "own": own_rate, "projected": projected_rate}
            shares = [factor / statistics[f"{name}_total"] for name, factor in factors.items()]
            SoftenedPair(self.temperature).differentiate(own, projected, shares)
            subtract_at(own, self.targets[rows], own_rate)
            subtract_at(projected, self.projected_targets[rows], projected_rate)
        t2s_ce = statistics["t2s_ce"] * self.projected_weights[rows]
        return {"ce": statistics["ce"], "t2s_ce": t2s_ce, "kd_student": weighted * kl}


class TeacherSpace(Criterion):
    """Compute the term `kd_teacher` = D(p^t || p^{s->t}) from the logits of the projected student and of the teacher.

    The only statistic is `entropy` = H(p^t) at temperature 1. For the arguments, see `StudentSpace`.
    """

    def __init__(self, temperature: float, divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl) -> None:
        super().__init__({})
        self.rates = {"kd_teacher": 1.0}  # the callers weight the term
        self.temperature, self.divergence = temperature, divergence

    def terms(self, logits: Sides, chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        projected, own = ((side / self.temperature).log_softmax(-1) for side in logits)
        return {"kd_teacher": self.divergence(own.detach(), projected)}

    def statistics(self, logits: Sides, chunk: Chunk) -> Statistics:
        return {"entropy": entropy(logits[1].log_softmax(-1))}


class ForwardKlTeacherSpace(TeacherSpace):
    """`TeacherSpace` with D = KL(p^t || p^{s->t}) and a hand-written gradient."""

    def observe(self, logits: Sides, chunk: Chunk) -> Statistics:
        projected, own = (side.t() for side in logits)
        pair = SoftenedPair(self.temperature)
        learned, target, kl = pair.observe(projected, own, entropy_of=own, totals_of=(own,))
        totals = {"projected_soft_total": learned.soft_total, "own_soft_total": target.soft_total}
        return {"entropy": target.entropy(), "kl": kl, **totals}

    def differentiate(
        self, logits: Sides, chunk: Chunk, statistics: Statistics, weights: Tensor | None, needs: Sequence[bool]
    ) -> dict[str, Tensor]:
        if needs[0]:
            projected, own = (side.t() for side in logits)
            shares = [(1 / self.temperature) / statistics[f"{name}_soft_total"] for name in ("projected", "own")]
            SoftenedPair(self.temperature).differentiate(projected, own, shares)
        return {"kd_teacher": statistics["kl"]}


def student_space(divergence: Callable[[Tensor, Tensor], Tensor]) -> type[StudentSpace]:
    """Return the fastest class for a divergence in the student's space."""
    return ForwardKlSpace if divergence is forward_kl else StudentSpace


def teacher_space(temperature: float, divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl) -> TeacherSpace:
    """Return the fastest criterion for a divergence in the teacher's space."""
    kind = ForwardKlTeacherSpace if divergence is forward_kl else TeacherSpace
    return kind(temperature, divergence)
